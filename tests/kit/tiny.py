"""Small models for tests."""

from __future__ import annotations

import torch

from openmythos import MythosConfig, OpenMythos

SMALL = dict(
    vocab_size=37,
    dim=24,
    n_heads=2,
    n_kv_heads=1,
    max_seq_len=24,
    max_loop_iters=4,
    prelude_layers=1,
    coda_layers=1,
    kv_lora_rank=10,
    q_lora_rank=9,
    qk_rope_head_dim=4,
    qk_nope_head_dim=6,
    v_head_dim=5,
    n_experts=5,
    n_shared_experts=1,
    n_experts_per_tok=2,
    expert_dim=7,
    lora_rank=3,
)


def tiny_config(**fields) -> MythosConfig:
    return MythosConfig(**{**SMALL, **fields})


def enliven(model, seed: int = 0, halt: float = 1.0):
    """Draws all parameters anew, so that each of them matters.

    With the models' own initialization, attention and experts contribute next to nothing, and errors would hide.
    `halt` scales the weight of the halting head.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(like, std):
        return torch.randn(like.shape, generator=draw).to(like) * std

    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.copy_(1 + normal(p, 0.2))
            elif "act.halt" in name:
                p.copy_(normal(p, halt))
            elif p.dim() == 2 and not name.startswith("embed"):
                p.copy_(normal(p, p.shape[1] ** -0.5))
            else:
                p.copy_(normal(p, 0.5))
        for name, b in model.named_buffers():
            if name.endswith("router_bias"):
                b.copy_(normal(b, 0.3))
    return model


def tiny_model(seed: int = 0, halt: float = 1.0, **fields) -> OpenMythos:
    """A model in eval mode whose positions halt at different loops."""
    return enliven(OpenMythos(tiny_config(**fields)), seed, halt).eval()


def tokens(*shape: int, seed: int = 0, vocab: int = 37) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frobenius norm of the difference, relative to that of `b`."""
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp(min=1e-300))
