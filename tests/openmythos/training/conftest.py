"""A model small enough that a training step is all overhead."""

import pytest
import torch

from openmythos import DenseConfig, DenseTransformer, MythosConfig, OpenMythos

SMALL = dict(
    vocab_size=256,
    dim=32,
    n_heads=2,
    n_kv_heads=1,
    max_seq_len=64,
    max_loop_iters=2,
    prelude_layers=0,
    coda_layers=0,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    n_experts=3,
    n_shared_experts=1,
    n_experts_per_tok=2,
    expert_dim=16,
    lora_rank=4,
)


@pytest.fixture
def build():
    """build(seed, **fields): an OpenMythos, or with n_layers a DenseTransformer, that is the same for the same seed."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        if "n_layers" in changes:
            return DenseTransformer(DenseConfig(**{**SMALL, **changes}))
        return OpenMythos(MythosConfig(**{**SMALL, **changes}))

    return make
