"""Latent attention (MLA): per-head attention for prompts and training; absorbed attention and whole layers for
decoding."""

from openmythos_kernels.ops.dtypes import FLOATS as DTYPES
from openmythos_kernels.ops.mla.attention import attention, mla_attention
from openmythos_kernels.ops.mla.attention_rows import attention_rows, attention_rows_backward, mla_attention_rows
from openmythos_kernels.ops.mla.decode import decode, mla_decode
from openmythos_kernels.ops.mla.latent import append, attend_latent, mla_append, mla_attend_latent
from openmythos_kernels.ops.mla.linear import linear, mla_linear
from openmythos_kernels.ops.mla.norm_rope import mla_norm_rope, norm_rope

__all__ = [
    "DTYPES",
    "append",
    "attend_latent",
    "attention",
    "attention_rows",
    "attention_rows_backward",
    "decode",
    "linear",
    "mla_append",
    "mla_attend_latent",
    "mla_attention",
    "mla_attention_rows",
    "mla_decode",
    "mla_linear",
    "mla_norm_rope",
    "norm_rope",
]
