"""One op in one case: the results of the fast op, of eager PyTorch and of float64, compared.

The test modes (CPU kernels, Triton's interpreter, generated code, CUDA on the CPU) and `python -m openmythos_kernels
verify` differ only in where the fast op runs; the comparison is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from openmythos_kernels.verify.budget import assert_within_budget, flat, pools
from openmythos_kernels.verify.specification import Inputs, Outputs, Sizes, Specification

Results = dict[str, Tensor | None]  # outputs by name; gradients as d<input>, d<input>[<i>] for lists
_FEW = 64  # elements; with fewer, eager's error in one draw is a matter of luck
_DRAWS = 6
_NEIGHBOURS = 4


@dataclass(frozen=True)
class Trial:
    """One draw of inputs and upstream gradients, with the results of eager PyTorch and of float64."""

    inputs: Inputs
    grads: Mapping[str, Tensor]  # per differentiable output
    eager: Results
    truth: Results


def trials(
    specification: Specification, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[Trial]:
    """Several draws if a result has so few elements that one draw would leave the budget to luck, else one."""
    first = trial(specification, sizes, dtype, device, seed)
    few = any(
        0 < x.numel() < _FEW for name, x in first.eager.items() if x is not None and name not in specification.exact
    )
    return [first, *(trial(specification, sizes, dtype, device, seed + 1 + i) for i in range(_DRAWS - 1 if few else 0))]


def trial(specification: Specification, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Trial:
    """One draw. The generator is the device's, so that a seed gives the same inputs on every device of that type."""
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
    """The inputs with each element one rounding up or down, or unchanged."""

    def moved(x):
        if isinstance(x, (list, tuple)):
            return [moved(item) for item in x]
        if not (isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64)):
            return x  # in low precision a rounding is a large step
        step = torch.randint(-1, 2, x.shape, generator=generator, device=x.device)
        return torch.where(step == 0, x, torch.nextafter(x, step.to(x.dtype) * torch.finfo(x.dtype).max))

    return {name: moved(x) for name, x in inputs.items()}


def at_worst(specification: Specification, drawn: Trial) -> Trial:
    """The trial of a chained op, with eager PyTorch's errors at neighbouring inputs where these are larger than its own
    error."""
    eager: dict[str, Any] = dict(drawn.eager)
    device = next(x.device for x in drawn.eager.values() if x is not None)
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(_NEIGHBOURS):
        inputs = neighbour(drawn.inputs, generator)
        there: dict[str, Any] = run(specification.reference, inputs, specification.differentiable, drawn.grads)
        true: dict[str, Any] = run(specification.reference, wide(inputs), specification.differentiable, drawn.grads)
        if any(not torch.equal(there[name], eager[name]) for name in specification.exact):
            continue  # other positions halted, so the errors cannot be compared
        for name, here in eager.items():
            if name not in specification.exact and here is not None:
                exact: Any = drawn.truth[name]
                truth, error = exact.double(), there[name].double() - true[name].double()
                if error.norm() > (here.double() - truth).norm():
                    eager[name] = (truth + error).to(here.dtype)
    return replace(drawn, eager=eager)


def run(call: Callable[..., Outputs], inputs: Inputs, wanted: Sequence[str], grads: Mapping[str, Tensor]) -> Results:
    """Outputs and the gradients of `wanted`; inputs stay unchanged. A gradient is None if no output depends on it."""
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
    inputs = dict(inputs)
    leaves: dict[str, Tensor] = {}
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
        AssertionError: an exact output differs, or tensors break the budget; names each tensor and says by how much.
    """
    for results, trial in zip(found, drawn):
        for name in specification.exact:
            mine: Any = results[name]
            eager: Any = trial.eager[name]
            if not torch.equal(mine, eager):
                same = mine.shape == eager.shape
                at = f"at {(mine != eager).nonzero()[0].tolist()}" if same else "in its shape"
                raise AssertionError(f"{name} must equal the reference's bit for bit and differs {at}")

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
    flattened = ({name: flat(parts) for name, parts in kind.items()} for kind in (fast, eager, truth))
    assert_within_budget(*flattened, dtype=dtype, where=lambda name, at: _place(fast[name], at))


def errors(
    specification: Specification, found: Sequence[Results], drawn: Sequence[Trial]
) -> dict[str, tuple[float, float]]:
    """Inexact output or gradient -> relative errors in Frobenius norm against float64, of the fast op and of eager."""
    result = {}
    fast, eager, truth = _quantities(specification, found, drawn)
    for name, parts in truth.items():
        reference = flat(parts).double()
        size = float(reference.norm()) or 1.0
        ours, theirs = (float((flat(kind[name]).double() - reference).norm()) / size for kind in (fast, eager))
        result[name] = ours, theirs
    return result


def _quantities(
    specification: Specification, found: Sequence[Results], drawn: Sequence[Trial]
) -> list[dict[str, dict]]:
    """What is compared, of the fast op, eager PyTorch and float64: quantity -> label -> tensor.

    All draws of a quantity count as one, and all tensors of a list: the weight of an expert that a single token chose
    has a gradient of a few rounding errors, stretched over a matrix.
    """
    alike = [_alike(results, trial.eager, trial.truth) for results, trial in zip(found, drawn)]
    inexact = [
        [{n: x for n, x in draw.items() if n not in specification.exact} for draw in kind] for kind in zip(*alike)
    ]
    return [pools(kind, lambda name: name.partition("[")[0]) for kind in inexact]


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """True if two results of the same call have the same bits, NaN and the sign of zero included."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(*(_bytes(x) for x in (a, b)))


def _bytes(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _alike(*kinds: Results) -> list[Results]:
    """The same results, with zeros for a None where another has a tensor."""
    shown = {name: next((kind[name] for kind in kinds if kind[name] is not None), None) for name in kinds[0]}
    return [
        {name: torch.zeros_like(x) if x is not None and kind[name] is None else kind[name] for name, x in shown.items()}
        for kind in kinds
    ]


def _place(parts: Mapping[str, Tensor], at: int) -> str:
    """The name of the element with flat index `at` in all parts, one after the other."""
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
    """Runs the fast op on all trials, and on the first one twice, by the backend that is chosen or forced.

    Args:
        arrange: `(inputs) -> inputs`: the same values in another memory layout.

    Returns:
        The fast op's results, and the trials.

    Raises:
        AssertionError: the results of the two runs differ.
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
    """`attempt`, then `judge`: the results are within the budget, and two runs give the same bits.

    Returns:
        The trials, for further checks on the same inputs.

    Raises:
        AssertionError: from either.
    """
    fast, drawn = attempt(specification, sizes, dtype, device, seed, arrange)
    judge(specification, dtype, fast, drawn)
    return drawn
