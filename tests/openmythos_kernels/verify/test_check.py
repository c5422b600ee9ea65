"""`check` finds every kind of fault in an op that has a specification."""

import dataclasses
import itertools

import pytest
import torch

from openmythos_kernels.verify.check import at_worst, check, judge, same_bits, trials
from openmythos_kernels.verify.specification import Specification
from openmythos_kernels.verify.specs import specifications

CPU = torch.device("cpu")


def make(sizes, dtype, device, generator):
    x = torch.randn(sizes["n"], 40, generator=generator, device=device).to(dtype)
    w = [torch.randn(40, generator=generator, device=device).to(dtype) for _ in range(3)]
    return {"x": x, "w": w, "held": sizes["n"] - 1, "absent": None}


def reference(x, w, held, absent):
    kept = x[:held]
    return {"y": (kept * w[0] * w[1]).tanh() + w[2], "sign": kept > 0}


def hostile(inputs):
    x = inputs["x"].clone()
    x[inputs["held"] :] = float("nan")
    return {**inputs, "x": x}


SOUND = Specification(
    name="sound",
    backends=("cpu",),
    make=make,
    fast=reference,
    reference=reference,
    differentiable=("x", "w", "absent"),
    exact=("sign",),
    cases={"plain": dict(n=5)},
    ranges=dict(n=(1, 9)),
    hostile=hostile,
)


def checked(fast):
    check(dataclasses.replace(SOUND, fast=fast), SOUND.cases["plain"], torch.float32, CPU)


def test_a_sound_op_passes():
    checked(reference)


def test_an_op_more_exact_than_eager_passes():
    """The truth is float64's, not eager's."""
    rounded = dataclasses.replace(
        SOUND,
        differentiable=(),
        exact=(),
        reference=lambda x, w, held, absent: {"y": (x[:held] + 1000) - 1000},
        fast=lambda x, w, held, absent: {"y": x[:held]},
    )
    check(rounded, SOUND.cases["plain"], torch.float32, CPU)


def wrong_value(x, w, held, absent):
    out = reference(x, w, held, absent)
    return {**out, "y": out["y"] + torch.eye(held, 40) * 1e-5}


def wrong_gradient(x, w, held, absent):
    return reference(x, [w[0], w[1].detach(), w[2]], held, absent)


def wrong_flag(x, w, held, absent):
    out = reference(x, w, held, absent)
    out["sign"][2, 5] ^= True
    return out


def looks_behind(x, w, held, absent):
    out = reference(x, w, held, absent)
    return {**out, "y": out["y"] + 0 * x.sum()}


_calls = itertools.count()


def another_sum_each_time(x, w, held, absent):
    out = reference(x, w, held, absent)
    return {**out, "y": out["y"] * (1 + 1e-6 * next(_calls))}


FAULTS = [
    (wrong_value, r"y: .*largest error .* at draw \d of y\[(\d), \1\] \(fast"),
    (wrong_gradient, r"dw: .*largest error .* at draw \d of dw\[1\]\[\d+\] \(fast"),
    (wrong_flag, r"sign must equal the reference's bit for bit and differs at \[2, 5\]"),
    (looks_behind, "y: inf/nan masks differ"),
    (another_sum_each_time, "y differs between two runs"),
]


@pytest.mark.parametrize("fast, message", FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_finds(fast, message):
    with pytest.raises(AssertionError, match=message):
        checked(fast)


def test_bits_are_bits():
    nan = torch.full((2,), float("nan"))
    assert same_bits(nan, nan.clone()) and same_bits(None, None) and not same_bits(nan, None)
    assert not same_bits(torch.zeros(1), -torch.zeros(1))
    assert same_bits(torch.ones(4)[::2], torch.ones(2)) and same_bits(torch.ones(4)[::4], torch.ones(1))


@pytest.mark.parametrize("specification", specifications(), ids=str)
def test_specifications_are_whole(specification):
    """Cases have every size that random shapes need, and hostile inputs are copies that differ from the inputs."""
    case = next(iter(specification.cases.values()))
    generator = torch.Generator().manual_seed(0)
    inputs = specification.make(case, specification.dtypes[0], CPU, generator)
    assert set(specification.differentiable) <= set(inputs)
    assert all(least <= most for least, most in specification.ranges.values())
    outputs = specification.reference(**inputs)
    assert set(specification.exact) <= set(outputs)
    if specification.hostile:
        before = [x.clone() for x in inputs.values() if isinstance(x, torch.Tensor)]
        specification.hostile(inputs)
        after = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
        assert all(map(same_bits, before, after))


def test_a_chained_op_is_held_to_eagers_worst_run_and_no_further():
    specification = next(d for d in specifications() if d.name == "loop_decode")
    drawn = trials(specification, specification.cases["past the trained depth"], torch.float32, torch.device("cpu"))
    worst = [at_worst(specification, t).eager for t in drawn]
    assert any(not torch.equal(w["latent"], t.eager["latent"]) for w, t in zip(worst, drawn))
    judge(specification, torch.float32, worst, drawn)
    wrong = [{**w, "latent": w["latent"] * (1 + 1e-5)} for w in worst]
    with pytest.raises(AssertionError, match="latent"):
        judge(specification, torch.float32, wrong, drawn)
