"""The error budget: a fast kernel may err about as much as eager PyTorch in the same dtype.

    err(fast, fp64 reference) <= 2 * err(eager, fp64 reference) + 2 ulp

in relative Frobenius norm and in largest absolute difference. An ulp is the dtype's epsilon, times the norm of the
reference and its largest magnitude respectively. The fast result must be inf or nan exactly where eager's is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = "Tensor | Sequence[Tensor | None] | Mapping[str, Tensor | None]"


def assert_within_budget(
    fast: Tensors,
    eager: Tensors,
    reference: Tensors,
    *,
    names: Sequence[str] | None = None,
    factor: float = 2.0,
    ulps: float = 2.0,
    dtype: torch.dtype | None = None,
    where: Callable[[str, int], str] | None = None,
) -> None:
    """Compares tensors one by one and reports every one that breaks the budget.

    Args:
        fast, eager: a tensor, a list or a dict of tensors in the dtype under test. None (no gradient) counts as zeros
            where another of the three has a tensor.
        reference: the same in float64.
        names: one name a tensor; dict keys by default, else positions.
        factor, ulps: the budget.
        dtype: an ulp is its epsilon; fast's own dtype by default. Give it where outputs are wider than the arithmetic,
            as under autocast.
        where: `(name, flat index) -> text` that names an element, for tensors made of several others; the index by
            default.

    Raises:
        AssertionError: names each failing tensor, its worst element, and the errors of the fast result and of eager.
    """
    fast, found = _listed(fast)
    eager, _ = _listed(eager)
    reference, _ = _listed(reference)
    names = list(names) if names is not None else found
    if not len(fast) == len(eager) == len(reference) == len(names):
        raise AssertionError(
            f"cannot pair {len(fast)} fast, {len(eager)} eager, {len(reference)} reference tensors, {len(names)} names"
        )
    failures = []
    for name, f, e, r in zip(names, fast, eager, reference):
        failure = _compare(f, e, r, factor, ulps, dtype, where and partial(where, name))
        if failure:
            failures.append(f"{name}: {failure}")
    if failures:
        raise AssertionError(f"{len(failures)} of {len(names)} tensors break the error budget\n" + "\n".join(failures))


def pooled(draws: Sequence[Mapping[str, Tensor | None]]) -> dict[str, Tensor | None]:
    """The quantities of several random draws, each concatenated flat; None where every draw has None.

    For tensors of few elements: eager's error in one scalar may happen to be almost zero, and the budget would then be
    a matter of luck.
    """
    found = pools(draws)
    return {name: flat(found[name]) if name in found else None for name in draws[0]}


def pools(
    draws: Sequence[Mapping[str, Tensor | None]], quantity: Callable[[str], str] = str
) -> dict[str, dict[str, Tensor]]:
    """Quantity -> label -> tensor, for the tensors of several draws; `quantity(name)` says what a tensor belongs to."""
    found: dict[str, dict[str, Tensor]] = {}
    for i, draw in enumerate(draws):
        for name, x in draw.items():
            if x is not None:
                label = f"draw {i} of {name}" if len(draws) > 1 else name
                found.setdefault(quantity(name), {})[label] = x
    return found


def flat(parts: Mapping[str, Tensor]) -> Tensor:
    """All elements of a quantity in one vector."""
    return torch.cat([x.detach().reshape(-1) for x in parts.values()])


def _listed(tensors: Tensors) -> tuple[list, list[str]]:
    if isinstance(tensors, Tensor):
        return [tensors], ["tensor"]
    if isinstance(tensors, Mapping):
        return list(tensors.values()), list(tensors)
    return list(tensors), [str(i) for i in range(len(tensors))]


def _compare(fast, eager, reference, factor, ulps, dtype, where) -> str | None:
    """The failure as text, or None."""
    present = [t for t in (fast, eager, reference) if t is not None]
    if not present:
        return None
    fast, eager, reference = (torch.zeros_like(present[0]) if t is None else t for t in (fast, eager, reference))
    if not fast.shape == eager.shape == reference.shape:
        return f"shapes differ: fast {tuple(fast.shape)}, eager {tuple(eager.shape)}, fp64 {tuple(reference.shape)}"
    if fast.dtype != eager.dtype:
        return f"dtypes differ: fast {fast.dtype}, eager {eager.dtype}"
    if fast.numel() == 0:
        return None
    ulp = torch.finfo(dtype or fast.dtype).eps
    where = where or partial(_index, fast.shape)
    fast, eager, reference = (t.detach().double().reshape(-1).cpu() for t in (fast, eager, reference))

    wrong = (fast.isnan() != eager.isnan()) | (fast.isinf() & (fast != eager)) | (eager.isinf() & (fast != eager))
    if wrong.any():
        at, count = int(wrong.nonzero()[0]), int(wrong.sum())
        return f"inf/nan masks differ in {count} elements, first {where(at)}: fast {fast[at]}, eager {eager[at]}"
    finite = fast.isfinite() & reference.isfinite()
    fast, eager, reference = (torch.where(finite, t, torch.zeros_like(t)) for t in (fast, eager, reference))

    off, off_eager = (fast - reference).abs(), (eager - reference).abs()
    messages = []
    size = reference.norm()
    mine, theirs = off.norm(), off_eager.norm()
    if mine > factor * theirs + ulps * ulp * size:
        messages.append(
            f"relative Frobenius error {_ratio(mine, size):.3g}, eager {_ratio(theirs, size):.3g} (ulp {ulp:.3g})"
        )
    largest = reference.abs().max()
    if off.max() > factor * off_eager.max() + ulps * ulp * largest:
        at = int(off.argmax())
        messages.append(
            f"largest error {off.max():.3g} at {where(at)} (fast {fast[at]:.9g}, eager {eager[at]:.9g}, "
            f"fp64 {reference[at]:.9g}), eager's largest {off_eager.max():.3g}, largest magnitude {largest:.3g}"
        )
    return "; ".join(messages) or None


def _index(shape: torch.Size, at: int) -> str:
    """The index of the element with flat index `at` in a tensor of this shape."""
    return str([int(i) for i in torch.unravel_index(torch.tensor(at), shape)])


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a / b) if b > 0 else float(a)
