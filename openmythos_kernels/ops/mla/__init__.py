"""Latent attention (MLA): `decode` runs one token per row through a whole layer."""

from openmythos_kernels.ops.mla.decode import DTYPES, decode, mla_decode

__all__ = ["DTYPES", "decode", "mla_decode"]
