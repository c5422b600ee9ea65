"""Named sizes: the seven that `open-mythos` publishes, and a matched looped/dense pair.

The published names promise round parameter counts. `python -m openmythos sizes` prints the real ones.
"""

from __future__ import annotations

from typing import Any

from openmythos.baseline import DenseConfig
from openmythos.config import MythosConfig

_NAMES = ("mythos_1b", "mythos_3b", "mythos_10b", "mythos_50b", "mythos_100b", "mythos_500b", "mythos_1t")
_PUBLISHED: dict[str, tuple[Any, ...]] = dict(
    dim=(2048, 3072, 4096, 6144, 8192, 12288, 16384),
    n_heads=(16, 24, 32, 48, 64, 96, 128),
    n_kv_heads=(4, 6, 8, 8, 8, 16, 16),
    max_seq_len=(4096, 4096, 8192, 8192, 1_000_000, 1_000_000, 1_000_000),
    max_loop_iters=(16, 16, 24, 32, 32, 48, 64),
    prelude_layers=(2, 2, 2, 3, 4, 4, 6),
    coda_layers=(2, 2, 2, 3, 4, 4, 6),
    kv_lora_rank=(256, 384, 512, 512, 512, 1024, 1024),
    q_lora_rank=(512, 768, 1024, 1536, 2048, 3072, 4096),
    qk_rope_head_dim=(32, 32, 64, 64, 64, 64, 64),
    qk_nope_head_dim=(64, 96, 128, 128, 128, 128, 128),
    v_head_dim=(64, 96, 128, 128, 128, 128, 128),
    n_experts=(64, 64, 128, 256, 256, 512, 512),
    n_shared_experts=(2, 2, 2, 4, 4, 8, 8),
    n_experts_per_tok=(4, 4, 4, 4, 8, 8, 8),
    expert_dim=(2048, 4096, 5632, 9728, 13568, 23040, 34560),
    vocab_size=(32000, 32000, 32000, 32000, 32000, 100000, 100000),
    rope_theta=(5e5, 5e5, 5e5, 5e5, 1e6, 1e6, 2e6),
    lora_rank=(8, 8, 16, 32, 64, 128, 256),
    max_output_tokens=(4096, 4096, 4096, 4096, 131072, 131072, 131072),
)


def _published(name: str) -> MythosConfig:
    column = _NAMES.index(name)
    return MythosConfig(**{field: row[column] for field, row in _PUBLISHED.items()})


def mythos_1b() -> MythosConfig:
    """dim 2048, 64 experts, 16 loops, 4k context."""
    return _published("mythos_1b")


def mythos_3b() -> MythosConfig:
    """dim 3072, 64 experts, 16 loops, 4k context."""
    return _published("mythos_3b")


def mythos_10b() -> MythosConfig:
    """dim 4096, 128 experts, 24 loops, 8k context."""
    return _published("mythos_10b")


def mythos_50b() -> MythosConfig:
    """dim 6144, 256 experts, 32 loops, 8k context."""
    return _published("mythos_50b")


def mythos_100b() -> MythosConfig:
    """dim 8192, 256 experts, 32 loops, 1M context."""
    return _published("mythos_100b")


def mythos_500b() -> MythosConfig:
    """dim 12288, 512 experts, 48 loops, 1M context."""
    return _published("mythos_500b")


def mythos_1t() -> MythosConfig:
    """dim 16384, 512 experts, 64 loops, 1M context."""
    return _published("mythos_1t")


# What both sides of the matched pair share. They differ in width and depth alone, so comparing them compares looping
# with more parameters, not tokenizers or attention shapes.
_PAIR: dict[str, Any] = dict(
    vocab_size=32768, max_seq_len=2048, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=128
)


def rdt_770m() -> MythosConfig:
    """6 prelude + 6 looped + 6 coda layers, 8 loops, 770M parameters: the looped side of the pair.

    The loop is that of the "770M looped against 1.3B dense" runs (Parcae, arXiv 2604.12946): Parcae's injection, dense
    FFNs, no ACT, no depth-wise LoRA.
    """
    return MythosConfig(
        **_PAIR,
        dim=1792,
        n_heads=14,
        q_lora_rank=896,
        ffn_dim=5632,
        prelude_layers=6,
        core_layers=6,
        coda_layers=6,
        max_loop_iters=8,
        core_ffn="dense",
        injection="parcae",
        h0="zeros",
        halting="off",
        lora_rank=0,
    )


def dense_1_3b() -> DenseConfig:
    """24 layers, 1.3B parameters: the dense side of the pair."""
    return DenseConfig(**_PAIR, dim=2048, n_heads=16, q_lora_rank=1024, ffn_dim=6528, n_layers=24)


VARIANTS = {
    function.__name__: function
    for function in (
        mythos_1b,
        mythos_3b,
        mythos_10b,
        mythos_50b,
        mythos_100b,
        mythos_500b,
        mythos_1t,
        rdt_770m,
        dense_1_3b,
    )
}
