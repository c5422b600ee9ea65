"""Attention of packed rows, beyond the cases of its specification."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tests.kit.shapes  # noqa: F401  (loads hypothesis' profile)
from openmythos_kernels.ops import mla
from openmythos_kernels.ops.mla import formula
from openmythos_kernels.runtime import backends
from openmythos_kernels.verify.check import check, same_bits
from openmythos_kernels.verify.specs import mla_attention as specs

NAMES = ("q_nope", "q_rope", "kv", "k_rope")
ROWS = next(d for d in specs.SPECIFICATIONS if d.name == "mla_attention_rows")


def packed(counts, keys, dtype=torch.float64, heads=2, nope=5, rope=4, v=3, seed=0):
    """Random inputs with counts[b] rows in sequence b, at random places."""
    g = torch.Generator().manual_seed(seed)
    at = [torch.randperm(keys, generator=g)[:n].sort()[0] for n in counts]
    B, N = len(counts), sum(counts)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return dict(
        q_nope=draw(N, heads, nope),
        q_rope=draw(N, heads, rope),
        kv=draw(B, keys, heads, nope + v),
        k_rope=draw(B, keys, rope),
        position=torch.cat([*at, torch.empty(0, dtype=torch.int64)]),
        offset=torch.tensor([0, *counts]).cumsum(0),
    )


def test_float64():
    """float64 takes the formula, whose gradients are those of its values."""
    inputs = packed([3, 0, 1, 5], 5)
    leaves = [inputs.pop(name).requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda *x: mla.attention_rows(**dict(zip(NAMES, x)), **inputs)[0], leaves)


@pytest.mark.parametrize("name", ["q_nope", "q_rope", "kv", "k_rope", "position", "offset"])
def test_errors(name):
    inputs = packed([2, 1], 4)
    for bad in (inputs[name][..., None, None], inputs[name].to(torch.int32)):
        with pytest.raises(ValueError, match=f"^{name}: got .*must be"):
            mla.attention_rows(**{**inputs, name: bad})


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize(
    "name, wrong",
    [
        ("position", [0, 4, 2]),
        ("position", [-1, 3, 2]),
        ("position", [3, 3, 2]),
        ("position", [3, 1, 2]),
        ("offset", [0, 2, 2]),
        ("offset", [1, 2, 3]),
        ("offset", [0, 4, 3]),
        ("offset", [0, -1, 3]),
    ],
)
def test_wrong_numbers(name, wrong):
    """The C++ kernels read no memory by numbers that do not fit."""
    inputs = packed([2, 1], 4, torch.float32) | {"position": torch.tensor([0, 3, 2])}
    inputs[name] = torch.tensor(wrong)
    with pytest.raises(ValueError, match=f"^{name}: got .*must"):
        mla.attention_rows(**inputs)


@pytest.mark.usefixtures("needs_extension")
@given(st.lists(st.integers(0, 70), max_size=5), st.sampled_from(ROWS.dtypes), st.integers(0, 99))
def test_any_numbers_of_rows(counts, dtype, seed):
    sizes = dict(rows=len(counts), keys=70, counts=counts or [0], heads=2, nope=16, rope=8, v=16)
    check(ROWS, sizes, dtype, torch.device("cpu"), seed)


@pytest.mark.usefixtures("needs_extension")
def test_lse():
    inputs = packed([40, 0, 1, 67], 70, torch.float32)
    got = mla.attention_rows(**inputs)[1]
    torch.testing.assert_close(got, formula.attention_rows(**inputs)[1], rtol=1e-5, atol=1e-5)


def both_forms(dtype, B=2, T=133):
    """Results and gradients of consecutive queries, and of the same queries packed."""
    inputs = packed([T] * B, T, dtype, heads=3, nope=16, rope=8, v=24)
    places = inputs.pop("position"), inputs.pop("offset")
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(B * T, 3, 24, generator=g).to(dtype)
    found = []
    for rows in (False, True):
        leaves = [inputs[name].clone().requires_grad_() for name in NAMES]
        if rows:
            out, lse = mla.attention_rows(*leaves, *places)
        else:
            out, lse = mla.attention(*(x.view(B, T, 3, -1) for x in leaves[:2]), *leaves[2:])
            out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
        found.append((out.detach(), lse, *torch.autograd.grad(out, leaves, grad)))
    return found


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_rows_are_consecutive_queries(dtype):
    """With every position of every sequence, the bits are those of `mla.attention`."""
    assert all(map(same_bits, *both_forms(dtype)))


@pytest.mark.parametrize("triton_mode", ["interpreter", "ptxsim"])
def test_all_rows_are_consecutive_queries_in_triton(triton_mode):
    with backends.forcing("triton"):
        assert all(map(same_bits, *both_forms(torch.float16, T=37)))
