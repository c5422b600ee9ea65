"""One described op in one case: what the fast op gives, what eager PyTorch gives, and the truth in float64.

The test modes (CPU kernels, Triton's interpreter, generated code, CUDA on the CPU) and `python -m openmythos_kernels
verify` differ only in where the fast op is called; what is compared is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openmythos_kernels.verify.budget import assert_within_budget
from openmythos_kernels.verify.specification import Inputs, Outputs, Sizes, Specification

Results = dict[str, Tensor | None]  # outputs by name; gradients as d<input>, d<input>[<i>] for lists
_FEW = 64  # elements: below, eager's error in one draw is a matter of luck
_DRAWS = 6
_NEIGHBOURS = 4


@dataclass(frozen=True)
class Trial:
    """One draw of inputs and upstream gradients, and what eager PyTorch and float64 make of them."""

    inputs: Inputs
    grads: Mapping[str, Tensor]  # per differentiable output
    eager: Results
    truth: Results


def trials(
    specification: Specification, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[Trial]:
    """Several draws where a result has so few elements that one would leave the budget to luck, else one."""
    first = trial(specification, sizes, dtype, device, seed)
    few = any(
        0 < x.numel() < _FEW for name, x in first.eager.items() if x is not None and name not in specification.exact
    )
    return [first, *(trial(specification, sizes, dtype, device, seed + 1 + i) for i in range(_DRAWS - 1 if few else 0))]


def trial(specification: Specification, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Trial:
    """One draw. Generators are the device's own, so that a seed gives the same inputs on the same kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    inputs = specification.make(sizes, dtype, device, generator)
    outputs = specification.reference(**inputs)
    grads = {
        name: torch.randn(out.shape, generator=generator, device=device).to(out.dtype)
        for name, out in outputs.items()
        if out.is_floating_point() and name not in specification.exact
    }
    eager = run(specification.reference, inputs, specification.differentiable, grads)
    truth = run(specification.reference, wide(inputs), specification.differentiable, grads)
    return Trial(inputs, grads, eager, truth)


def neighbour(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """The inputs, each number of tensors one rounding up or down, or as it is."""

    def moved(x):
        if isinstance(x, (list, tuple)):
            return [moved(item) for item in x]
        if not (isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64)):
            return x  # in low precision a rounding is no small step
        step = torch.randint(-1, 2, x.shape, generator=generator, device=x.device)
        return torch.where(step == 0, x, torch.nextafter(x, step.to(x.dtype) * torch.finfo(x.dtype).max))

    return {name: moved(x) for name, x in inputs.items()}


def at_worst(specification: Specification, drawn: Trial) -> Trial:
    """A trial of a chained op with the errors that eager PyTorch makes at neighbours, where they are larger than its
    own."""
    eager, device = dict(drawn.eager), next(x.device for x in drawn.eager.values() if x is not None)
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(_NEIGHBOURS):
        inputs = neighbour(drawn.inputs, generator)
        there = run(specification.reference, inputs, specification.differentiable, drawn.grads)
        true = run(specification.reference, wide(inputs), specification.differentiable, drawn.grads)
        if any(not torch.equal(there[name], eager[name]) for name in specification.exact):
            continue  # another choice was made: the errors are not alike
        for name, here in eager.items():
            if name not in specification.exact and here is not None:
                truth, error = drawn.truth[name].double(), there[name].double() - true[name].double()
                if error.norm() > (here.double() - truth).norm():
                    eager[name] = (truth + error).to(here.dtype)
    return replace(drawn, eager=eager)


def run(call: Callable[..., Outputs], inputs: Inputs, wanted: Sequence[str], grads: Mapping[str, Tensor]) -> Results:
    """Outputs and the gradients of `wanted`; inputs are not touched. A gradient is None where nothing depends on it."""
    inputs, leaves = with_leaves(inputs, wanted)
    outputs = call(**inputs)
    results: Results = {name: out.detach() for name, out in outputs.items()} | dict.fromkeys(leaves)
    pairs = [(out, grads[name].to(out.dtype)) for name, out in outputs.items() if out.requires_grad]
    if pairs:
        ends, given = zip(*pairs)
        found = torch.autograd.grad(ends, list(leaves.values()), given, allow_unused=True)
        results |= dict(zip(leaves, found))
    return results


def with_leaves(inputs: Inputs, wanted: Sequence[str]) -> tuple[Inputs, dict[str, Tensor]]:
    """The inputs with fresh leaves in place of the `wanted`, and these by the names of their gradients."""
    inputs, leaves = dict(inputs), {}
    for name in wanted:
        value = inputs[name]
        if isinstance(value, (list, tuple)):
            inputs[name] = [x.detach().requires_grad_() for x in value]
            leaves |= {f"d{name}[{i}]": x for i, x in enumerate(inputs[name])}
        elif value is not None:
            inputs[name] = leaves[f"d{name}"] = value.detach().requires_grad_()
    return inputs, leaves


def wide(inputs: Inputs) -> Inputs:
    """The same values in float64."""

    def widened(x):
        if isinstance(x, (list, tuple)):
            return [widened(item) for item in x]
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: widened(x) for name, x in inputs.items()}


def judge(specification: Specification, dtype: torch.dtype, found: Sequence[Results], drawn: Sequence[Trial]) -> None:
    """Compares the fast op's results, one per trial, with the budget.

    Raises:
        AssertionError: an exact output differs, or tensors break the budget; names each and says by how much.
    """
    for results, trial in zip(found, drawn):
        for name in specification.exact:
            mine, eager = results[name], trial.eager[name]
            if not torch.equal(mine, eager):
                at = (
                    (mine != eager).nonzero()[0].tolist() if mine.shape == eager.shape else "every place: shapes differ"
                )
                raise AssertionError(f"{name} must equal the reference's bit for bit, and does not at {at}")

    try:
        _judge_sizes(specification, dtype, found, drawn)
    except AssertionError:
        if not specification.chained:
            raise
        _judge_sizes(specification, dtype, found, [at_worst(specification, trial) for trial in drawn])


def _judge_sizes(
    specification: Specification, dtype: torch.dtype, found: Sequence[Results], drawn: Sequence[Trial]
) -> None:
    fast, eager, truth = _quantities(specification, found, drawn)
    flat = ({name: _flat(parts) for name, parts in kind.items()} for kind in (fast, eager, truth))
    assert_within_budget(*flat, dtype=dtype, where=lambda name, at: _place(fast[name], at))


def errors(
    specification: Specification, found: Sequence[Results], drawn: Sequence[Trial]
) -> dict[str, tuple[float, float]]:
    """Relative errors in Frobenius norm against float64, per inexact output and gradient: the fast op's and eager's."""
    result = {}
    fast, eager, truth = _quantities(specification, found, drawn)
    for name, parts in truth.items():
        reference = _flat(parts).double()
        size = float(reference.norm()) or 1.0
        result[name] = tuple(float((_flat(kind[name]).double() - reference).norm()) / size for kind in (fast, eager))
    return result


def _quantities(
    specification: Specification, found: Sequence[Results], drawn: Sequence[Trial]
) -> list[dict[str, dict]]:
    """What is compared: of the fast op, eager PyTorch and float64 each, name -> parts."""
    alike = [_alike(results, trial.eager, trial.truth) for results, trial in zip(found, drawn)]
    return [_pooled(kind, specification.exact) for kind in zip(*alike)]


def _flat(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in parts.values()])


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two results of the same call are the same to the bit, NaN and the sign of zero included."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(*(_bytes(x) for x in (a, b)))


def _bytes(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _alike(*kinds: Results) -> list[Results]:
    """The same with zeros where one has a tensor and another None."""
    shown = {name: next((kind[name] for kind in kinds if kind[name] is not None), None) for name in kinds[0]}
    return [
        {name: torch.zeros_like(x) if x is not None and kind[name] is None else kind[name] for name, x in shown.items()}
        for kind in kinds
    ]


def _pooled(draws: Sequence[Results], exact: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """All draws of a quantity as one, and all tensors of a list: the weight of an expert that one token chose has a
    gradient of a few rounding errors, stretched over a matrix. Budgets are for errors in the mean and at their
    worst."""
    pools: dict[str, dict[str, Tensor]] = {}
    for i, results in enumerate(draws):
        for name, x in results.items():
            if name not in exact and x is not None:
                label = f"draw {i} of {name}" if len(draws) > 1 else name
                pools.setdefault(name.partition("[")[0], {})[label] = x
    return pools


def _place(parts: Mapping[str, Tensor], at: int) -> str:
    """Which element of which tensor is the one with index `at` of them all, one behind the other."""
    for label, x in parts.items():
        if at < x.numel():
            index = torch.unravel_index(torch.tensor(at), x.shape)
            return f"{label}[{', '.join(str(int(i)) for i in index)}]"
        at -= x.numel()
    raise IndexError(at)


def attempt(
    specification: Specification,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    arrange: Callable[[Inputs], Inputs] = lambda inputs: inputs,
) -> tuple[list[Results], list[Trial]]:
    """Runs the fast op on all trials, on the backend that runs or is forced, and on the first one twice.

    Args:
        arrange: `(inputs) -> inputs`: the same values, laid out differently in memory.

    Returns:
        what the fast op gave, and the trials.

    Raises:
        AssertionError: results differ between two runs.
    """
    drawn = trials(specification, sizes, dtype, device, seed)
    hostile = specification.hostile or (lambda inputs: inputs)
    given = [arrange(hostile(t.inputs)) for t in drawn]
    fast = [run(specification.fast, inputs, specification.differentiable, t.grads) for inputs, t in zip(given, drawn)]
    again = run(specification.fast, given[0], specification.differentiable, drawn[0].grads)
    for name, value in fast[0].items():
        if not same_bits(value, again[name]):
            raise AssertionError(f"{name} differs between two runs on the same inputs")
    return fast, drawn


def check(
    specification: Specification,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    arrange: Callable[[Inputs], Inputs] = lambda inputs: inputs,
) -> list[Trial]:
    """`attempt`, then `judge`: within the budget, the same bits twice.

    Returns:
        the trials, for further checks of the same inputs.

    Raises:
        AssertionError: as either says.
    """
    fast, drawn = attempt(specification, sizes, dtype, device, seed, arrange)
    judge(specification, dtype, fast, drawn)
    return drawn
