"""What PyTorch's compilers and dispatcher may expect of every described op, on CPU kernels."""

from unittest import mock

import pytest
import torch
from torch.utils import _pytree as pytree

from openmythos_kernels.ops.op import Op
from openmythos_kernels.runtime import extension
from openmythos_kernels.verify.check import run, trial
from openmythos_kernels.verify.specs import specifications

CPU = torch.device("cpu")
OPS = [d for d in specifications() if "cpu" in d.backends]
INDUCTOR = "rms_norm"  # the whole compiler takes long; one op's code shows that it can be called from generated code


@pytest.fixture(autouse=True, scope="module")
def needs_extension():
    assert extension.module is not None, extension.reason


def calls(specification) -> list:
    """(op, arguments) of each custom op that the specification's cases call, backward passes too; one of each kind."""
    found, original = {}, Op.__call__

    def kept(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.detach().clone().requires_grad_(x.requires_grad and torch.is_grad_enabled())

    def recording(self, *args):
        absent = tuple(x is None for x in args)
        kind = (
            self.name,
            absent,
            torch.is_grad_enabled(),
            min(x.numel() for x in args if isinstance(x, torch.Tensor)) == 0,
        )
        if kind not in found:
            found[kind] = self, pytree.tree_map(kept, args)
        return original(self, *args)

    with mock.patch.object(Op, "__call__", recording):
        for case in specification.cases.values():
            drawn = trial(specification, case, specification.dtypes[0], CPU)
            run(specification.fast, drawn.inputs, specification.differentiable, drawn.grads)
    return list(found.values())


@pytest.mark.parametrize("specification", OPS, ids=str)
def test_opcheck(specification):
    found = calls(specification)
    assert found
    for op, args in found:
        torch.library.opcheck(op.overload, args)


@pytest.mark.parametrize("specification", OPS, ids=str)
def test_compiled_whole_equals_eager(specification):
    """One graph, forward and backward; AOTAutograd traces through the fakes and the registered gradients."""
    drawn = trial(specification, next(iter(specification.cases.values())), specification.dtypes[0], CPU)
    torch._dynamo.reset()
    backend = "inductor" if specification.name == INDUCTOR else "aot_eager"
    compiled = torch.compile(specification.fast, fullgraph=True, backend=backend, dynamic=False)
    expected, found = (
        run(call, drawn.inputs, specification.differentiable, drawn.grads) for call in (specification.fast, compiled)
    )
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
