"""Named sizes: the seven that `open-mythos` publishes, and a matched looped/dense pair.

The published names promise round parameter counts; `python -m openmythos sizes`
prints what the configurations really hold.
"""

from __future__ import annotations

from openmythos.baseline import DenseConfig
from openmythos.config import MythosConfig

# fmt: off
_COLUMNS = (
    "dim", "n_heads", "n_kv_heads", "max_seq_len", "max_loop_iters", "prelude_layers", "coda_layers",
    "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
    "n_experts", "n_shared_experts", "n_experts_per_tok", "expert_dim",
    "vocab_size", "rope_theta", "lora_rank", "max_output_tokens",
)
_PUBLISHED = {
    # width, heads, kv heads, context, loops, prelude, coda | latent, q, rope, nope, v | experts | vocabulary, theta,
    # lora, output
    "mythos_1b":   (2048,  16,  4,  4096,      16, 2, 2,  256,  512,  32, 64,  64,   64,  2, 4, 2048,   32000,  5e5, 8,   4096),
    "mythos_3b":   (3072,  24,  6,  4096,      16, 2, 2,  384,  768,  32, 96,  96,   64,  2, 4, 4096,   32000,  5e5, 8,   4096),
    "mythos_10b":  (4096,  32,  8,  8192,      24, 2, 2,  512,  1024, 64, 128, 128,  128, 2, 4, 5632,   32000,  5e5, 16,  4096),
    "mythos_50b":  (6144,  48,  8,  8192,      32, 3, 3,  512,  1536, 64, 128, 128,  256, 4, 4, 9728,   32000,  5e5, 32,  4096),
    "mythos_100b": (8192,  64,  8,  1_000_000, 32, 4, 4,  512,  2048, 64, 128, 128,  256, 4, 8, 13568,  32000,  1e6, 64,  131072),
    "mythos_500b": (12288, 96,  16, 1_000_000, 48, 4, 4,  1024, 3072, 64, 128, 128,  512, 8, 8, 23040,  100000, 1e6, 128, 131072),
    "mythos_1t":   (16384, 128, 16, 1_000_000, 64, 6, 6,  1024, 4096, 64, 128, 128,  512, 8, 8, 34560,  100000, 2e6, 256, 131072),
}
# fmt: on


def _published(name: str) -> MythosConfig:
    return MythosConfig(**dict(zip(_COLUMNS, _PUBLISHED[name])))


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


# What both sides of the matched pair share. Only width and depth differ, so that a comparison of the
# two compares looping with parameters, not tokenisers or attention shapes.
_PAIR = dict(
    vocab_size=32768, max_seq_len=2048, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=128
)


def rdt_770m() -> MythosConfig:
    """6 prelude + 6 looped + 6 coda layers, the core looped 8 times, 770M parameters.

    Looped as the runs behind "770M looped against 1.3B dense" were (Parcae, arXiv 2604.12946): its
    injection, no ACT, dense FFNs, no depth-wise LoRA.
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
