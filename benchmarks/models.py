"""Configurations of the measured models."""

from __future__ import annotations

from dataclasses import fields

from openmythos.variants import mythos_1b

# The model of the headline requirements: 24 million parameters, 4 blocks outside the loop, 1 inside.
HEADLINE = dict(
    vocab_size=256,
    dim=512,
    n_heads=8,
    max_seq_len=2304,
    max_loop_iters=16,
    prelude_layers=2,
    coda_layers=2,
    kv_lora_rank=128,
    q_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_experts=32,
    n_shared_experts=2,
    n_experts_per_tok=4,
    expert_dim=256,
    lora_rank=8,
)

# Small enough to train for some hundred steps in seconds.
SMALL = dict(
    vocab_size=256,
    dim=128,
    n_heads=4,
    max_seq_len=256,
    max_loop_iters=4,
    prelude_layers=1,
    coda_layers=1,
    kv_lora_rank=64,
    q_lora_rank=96,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_experts=8,
    n_shared_experts=1,
    n_experts_per_tok=2,
    expert_dim=64,
    lora_rank=8,
)

# Only the fields that differ from the defaults, which are open-mythos' own, so that no field is unknown to open-mythos.
MYTHOS_1B = {f.name: value for f in fields(mythos_1b()) if (value := getattr(mythos_1b(), f.name)) != f.default}
