"""Private names of PyTorch: each stands in `openmythos/compat.py`, and each says what its comment says."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from openmythos import compat

ROOT = Path(__file__).resolve().parents[2]
# Where a private module of PyTorch is reached: imports and attribute chains such as torch._C._functorch.
PRIVATE = re.compile(
    r"\btorch(\.\w+)*\._(?!_)\w+|import _global_\w+|forward_ad\._\w+|\._current_graph_task_id|\._schema\b"
)


def test_private_names_stand_in_one_file():
    found = []
    for package in ("openmythos", "openmythos_kernels"):
        for file in sorted((ROOT / package).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            if name == "openmythos/compat.py":
                continue
            for number, line in enumerate(file.read_text().splitlines(), 1):
                if PRIVATE.search(line):
                    found.append(f"{name}:{number}: {line.strip()}")
    assert not found


def test_every_name_is_there():
    assert all(hasattr(compat, name) for name in compat.__all__)


def test_backward_pass_has_a_number():
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(compat.backward_pass()))
    x.sum().backward()
    assert compat.backward_pass() == -1 and seen[0] >= 0


def test_transforms_are_seen():
    x, seen = torch.ones(3), []

    def look(x):
        seen.append((compat.in_transform(), compat.in_vmap(), compat.forward_mode_open(), compat.transformed()))
        return x.sum()

    look(x)
    torch.func.grad(look)(x)
    torch.func.vmap(look)(x[None])
    with forward_ad.dual_level():
        look(x)
    torch.func.jvp(look, (x,), (x,))
    assert seen == [
        (False, False, False, False),
        (True, False, False, True),
        (True, True, False, True),
        (False, False, True, True),
        (True, False, True, True),
    ]


def test_wrappers_of_grad_are_taken_off():
    x, seen = torch.ones(3), []

    def look(y):
        inner = compat.without_grad_levels(y)
        seen.append((compat.is_transform_wrapper(y), compat.is_transform_wrapper(inner), inner.data_ptr()))
        return y.sum()

    torch.func.grad(look)(x)
    assert seen == [(True, False, x.data_ptr())] and compat.without_grad_levels(x) is x


def test_jit_tracing_is_seen():
    seen = []

    def look(x):
        seen.append(compat.tracing_with_jit() and compat.transformed())
        return x + 1

    torch.jit.trace(look, torch.ones(1), check_trace=False)
    assert seen == [True] and not compat.tracing_with_jit()


def test_fake_tensors_are_seen():
    x = torch.ones(2)
    assert not compat.fake_mode_active(x) and not compat.is_in_torch_dispatch_mode()
    with FakeTensorMode() as mode:
        assert compat.fake_mode_active(x) and compat.is_in_torch_dispatch_mode()
    fake = mode.from_tensor(x)
    assert compat.fake_mode_active(fake) and compat.is_fake(fake) and isinstance(fake, compat.STAND_INS)


def test_hooks_are_seen():
    assert not compat.saved_tensors_are_hooked() and not any(compat.GLOBAL_MODULE_HOOKS)
    with torch.autograd.graph.save_on_cpu():
        assert compat.saved_tensors_are_hooked()
    for register in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        handle = getattr(torch.nn.modules.module, f"register_module_{register}_hook")(lambda *_: None)
        assert any(compat.GLOBAL_MODULE_HOOKS), register
        handle.remove()


@pytest.mark.parametrize("name", ["_get_fsdp_state", None])
def test_fsdp_is_seen_by_its_marks(name):
    module = torch.nn.Linear(1, 1)
    assert not compat.is_fsdp(module)
    if name:
        setattr(module, name, lambda: None)
    else:
        module.add_module(compat.FSDP_PART, torch.nn.Identity())
    assert compat.is_fsdp(module)


def test_kernels_below_autograd():
    x = torch.ones(2, requires_grad=True)
    with compat.below_autograd():
        assert (x * 2).grad_fn is None
    assert compat.has_kernel("aten::add.out", "CPU") and not compat.has_kernel("aten::add.out", "FPGA")
    assert len(compat.schema_of(torch.ops.aten.mul.Tensor).arguments) == 2
    to = [torch.zeros(2), torch.zeros(1)]
    compat.foreach_copy_(to, [torch.ones(2), torch.ones(1)])
    assert all(t.eq(1).all() for t in to)
