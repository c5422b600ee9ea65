"""Specifications of `moe_experts`, once and several times in a forward, and of `swiglu_ffn`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from openmythos.variants import VARIANTS
from openmythos_kernels.ops.moe import formula
from openmythos_kernels.ops.moe.experts import moe_experts
from openmythos_kernels.ops.moe.ffn import swiglu_ffn
from openmythos_kernels.ops.moe.repeated import RepeatedExperts
from openmythos_kernels.verify.specification import Inputs, Outputs, Sizes, Specification, drawer

_WEIGHTS = ("w_gate", "w_up", "w_down", "shared_gate", "shared_up", "shared_down")


def _choice(sizes: Sizes, device, generator) -> Tensor:
    """(N, K) distinct experts for each token, unless all pairs go to one expert."""
    N, E, K = sizes["tokens"], sizes["experts"], sizes["k"]
    if generator is None:
        return torch.empty(N, K, dtype=torch.int64, device=device)
    if sizes.get("routing") == "one expert":
        return torch.full((N, K), E - 1, device=device)
    among = K if sizes.get("routing") == "few experts" else E
    return torch.rand(N, among, generator=generator, device=device).argsort(-1)[:, :K].contiguous()


def _make_experts(sizes: Sizes, dtype, device, generator) -> Inputs:
    N, D, I, E, K, S = (sizes[name] for name in ("tokens", "dim", "inner", "experts", "k", "shared"))
    draw = drawer(dtype, device, generator)
    kept = torch.float32 if sizes.get("masters") else dtype  # float32 masters, as under autocast

    def matrices(count: int, rows: int, columns: int) -> list[Tensor]:
        return [draw(rows, columns, scale=columns**-0.5, as_dtype=kept) for _ in range(count)]

    wide = sizes.get("shared_inner", I * K)
    shapes = ((E, I, D), (E, I, D), (E, D, I), (S, wide, D), (S, wide, D), (S, D, wide))
    topk_weights = draw(N, K)
    return dict(
        x=draw(N, D),
        expert_idx=_choice(sizes, device, generator),
        topk_weights=topk_weights if generator is None else topk_weights.float().softmax(-1).to(dtype),
        **{name: matrices(*shape) for name, shape in zip(_WEIGHTS, shapes)},
    )


def _fast_experts(**inputs) -> Outputs:
    """With gradients the op saves tensors for them; without, few tokens take another path."""
    with torch.no_grad():
        alone = moe_experts(**inputs)
    return {"y": moe_experts(**inputs), "y without gradients": alone}


def _reference_experts(x, expert_idx, topk_weights, **weights) -> Outputs:
    y = formula.experts(x, expert_idx, topk_weights, **weights)
    return {"y": y, "y without gradients": y.detach()}


def _shape(tokens: int, dim: int, inner: int, experts: int, k: int, shared: int, **more) -> dict:
    return dict(tokens=tokens, dim=dim, inner=inner, experts=experts, k=k, shared=shared, **more)


def _published(cfg, tokens: int, **more) -> dict:
    return _shape(tokens, cfg.dim, cfg.expert_dim, cfg.n_experts, cfg.n_experts_per_tok, cfg.n_shared_experts, **more)


_EXPERTS = Specification(
    name="moe_experts",
    backends=("cpu", "triton"),
    make=_make_experts,
    fast=_fast_experts,
    reference=_reference_experts,
    differentiable=("x", "topk_weights", *_WEIGHTS),
    cases={
        "several": _shape(21, 40, 24, 6, 2, 1),
        "no token": _shape(0, 24, 16, 5, 2, 1),
        "one token": _shape(1, 64, 32, 8, 2, 2),
        "primes": _shape(7, 37, 17, 7, 3, 1),
        "last that are few": _shape(16, 32, 16, 32, 4, 2, shared_inner=24),
        "first that are sorted": _shape(17, 33, 19, 5, 2, 1),
        "k = 1": _shape(9, 40, 8, 4, 1, 1),
        "k = experts": _shape(23, 16, 8, 3, 3, 1),
        "one expert": _shape(5, 16, 8, 1, 1, 0),
        "no shared expert": _shape(31, 16, 8, 4, 2, 0),
        "width one": _shape(3, 1, 1, 2, 1, 1),
        "all to one": _shape(40, 24, 17, 5, 2, 1, routing="one expert"),
        "few to one": _shape(4, 24, 17, 5, 2, 1, routing="one expert"),
        "experts without a token": _shape(20, 24, 16, 9, 2, 1, routing="few experts"),
        "float32 weights": _shape(18, 24, 16, 5, 2, 1, masters=True),
        "tiles of several sizes, shared experts by the library": _shape(150, 32, 24, 2, 1, 2),
    },
    ranges=dict(tokens=(0, 60), dim=(1, 70), inner=(1, 40), experts=(2, 9), k=(1, 2), shared=(0, 2)),
    shipped={
        **{f"{name}, 4096 tokens": _published(cfg(), 4096) for name, cfg in VARIANTS.items()},
        **{f"{name}, decoding": _published(cfg(), 8) for name, cfg in VARIANTS.items()},
        "mythos_1b, 4096 tokens, float32 weights": _published(VARIANTS["mythos_1b"](), 4096, masters=True),
    },
    matrix=True,
)


def _make_repeated(sizes: Sizes, dtype, device, generator) -> Inputs:
    """The inputs of one call with all tokens, which are then divided over the calls."""
    inputs = _make_experts({**sizes, "tokens": sizes["tokens"] * sizes["calls"]}, dtype, device, generator)
    return inputs | {
        name: inputs[name].unflatten(0, (sizes["calls"], -1)) for name in ("x", "expert_idx", "topk_weights")
    }


def _fast_repeated(x, expert_idx, topk_weights, once: float = 0, **weights) -> Outputs:
    if torch.compiler.is_compiling():  # as in the module, compilers see separate calls
        return {"y": torch.stack([moe_experts(*call, **weights) for call in zip(x, expert_idx, topk_weights)])}
    experts = RepeatedExperts(list(weights.values()), once=once)
    return {"y": torch.stack([experts(*call) for call in zip(x, expert_idx, topk_weights)])}


def _reference_repeated(x, expert_idx, topk_weights, **weights) -> Outputs:
    calls = zip(x, expert_idx, topk_weights)
    return {"y": torch.stack([_reference_experts(*call, **weights)["y"] for call in calls])}


_REPEATED = Specification(
    name="moe_experts_backward_add",
    backends=("cpu", "triton"),
    make=_make_repeated,
    fast=_fast_repeated,
    reference=_reference_repeated,
    differentiable=("x", "topk_weights", *_WEIGHTS),
    cases={
        "several": _shape(21, 40, 24, 6, 2, 1, calls=3),
        "one token": _shape(1, 64, 32, 8, 2, 2, calls=2),
        "primes": _shape(7, 37, 17, 7, 3, 1, calls=2),
        "experts without a token": _shape(20, 24, 16, 9, 2, 1, calls=2, routing="few experts"),
        "no shared expert": _shape(31, 16, 8, 4, 2, 0, calls=2),
        "float32 weights": _shape(18, 24, 16, 5, 2, 1, calls=2, masters=True),
        "shared experts by the library": _shape(140, 24, 16, 4, 1, 2, calls=2),
    },
    ranges=dict(tokens=(1, 40), dim=(1, 70), inner=(1, 40), experts=(2, 9), k=(1, 2), shared=(0, 2), calls=(2, 3)),
    shipped={f"{name}, 4096 tokens": _published(cfg(), 4096, calls=2) for name, cfg in VARIANTS.items()},
    matrix=True,
)

_ONCE = replace(
    _REPEATED,
    name="moe_experts_backward_rows",
    fast=lambda **inputs: _fast_repeated(once=float("inf"), **inputs),
    shipped={name: sizes for name, sizes in _REPEATED.shipped.items() if name.startswith("mythos_1b")},
)


def _make_ffn(sizes: Sizes, dtype, device, generator) -> Inputs:
    N, D, I = sizes["tokens"], sizes["dim"], sizes["inner"]
    draw = drawer(dtype, device, generator)
    return dict(
        x=draw(N, D), gate=draw(I, D, scale=D**-0.5), up=draw(I, D, scale=D**-0.5), down=draw(D, I, scale=I**-0.5)
    )


_FFN = Specification(
    name="swiglu_ffn",
    backends=("cpu", "triton"),
    make=_make_ffn,
    fast=lambda **inputs: {"y": swiglu_ffn(**inputs)},
    reference=lambda x, **weights: {"y": formula.expert(**weights)(x)},
    differentiable=("x", "gate", "up", "down"),
    cases={
        # First, as test modes may run only the first case in dtypes other than float32.
        "rows padded": dict(tokens=256, dim=24, inner=21),
        "several": dict(tokens=5, dim=40, inner=53),
        "no token": dict(tokens=0, dim=24, inner=32),
        "one token": dict(tokens=1, dim=64, inner=85),
        "primes": dict(tokens=7, dim=37, inner=17),
        "last that are few": dict(tokens=128, dim=33, inner=66),
        "first that are many": dict(tokens=129, dim=33, inner=66),
        "products by oneDNN": dict(tokens=130, dim=200, inner=210),
        "width one": dict(tokens=3, dim=1, inner=1),
    },
    ranges=dict(tokens=(0, 160), dim=(1, 100), inner=(1, 100)),
    shipped={
        f"{name}, 4096 tokens": dict(tokens=4096, dim=cfg().dim, inner=cfg().dim * 4 // 3)
        for name, cfg in VARIANTS.items()
    },
)

SPECIFICATIONS = [_EXPERTS, _REPEATED, _ONCE, _FFN]
