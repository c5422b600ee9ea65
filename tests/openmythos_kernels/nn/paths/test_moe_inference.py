"""The inference path of MoEFFN on a CPU: one call, which asks Python for logits and weights while threads compute."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import openmythos.moe
from openmythos_kernels.nn.moe import MoEFFN
from openmythos_kernels.ops.moe import moe_experts, moe_route
from openmythos_kernels.runtime import extension
from tests.kit.compare import swapped
from tests.kit.moe import lists
from tests.kit.threads import for_each_number


def layers(dtype=torch.float32, shared=2):
    """The same layer twice, the second swapped."""
    torch.manual_seed(0)
    config = SimpleNamespace(dim=24, n_experts=6, n_shared_experts=shared, n_experts_per_tok=2, expert_dim=16)
    reference = openmythos.moe.MoEFFN(config).to(dtype).eval()
    nn.init.normal_(reference.router_bias)
    return reference, swapped(reference, MoEFFN)


def by_ops(layer, x):
    flat = x.reshape(-1, x.shape[-1])
    idx, topk_weights, _ = moe_route(layer.router(flat), layer.router_bias, layer.topk)
    return moe_experts(flat, idx, topk_weights, *lists(layer)).view_as(x)


@pytest.fixture
def taken(monkeypatch):
    """For every call of the op, whether it gave a result."""
    counted, call = [], extension.module.moe_inference

    def counting(*args):
        result = call(*args)
        counted.append(type(result) is tuple)
        return result

    monkeypatch.setattr(extension, "module", SimpleNamespace(moe_inference=counting))
    return counted


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7, 150])
def test_same_bits_as_the_separate_ops(taken, tokens, dtype, shared):
    layer = layers(dtype, shared)[1]
    x = torch.randn(3, tokens, 24).to(dtype).transpose(0, 1)  # (tokens, 3, dim), not contiguous
    with torch.inference_mode():
        assert torch.equal(layer(x), by_ops(layer, x)) and taken == [True]


def test_training_mode_counts_the_load():
    reference, layer = (each.train() for each in layers())
    with torch.no_grad():
        for tokens in (3, 150):
            x = torch.randn(1, tokens, 24)
            torch.testing.assert_close(layer(x), reference(x))
    assert torch.equal(layer.expert_load, reference.expert_load)


@pytest.mark.parametrize("tokens, dtype", [(3, torch.float32), (150, torch.bfloat16)], ids=str)
def test_same_results_for_any_number_of_threads(tokens, dtype):
    layer, x = layers(dtype)[1], torch.randn(1, tokens, 24).to(dtype)
    with torch.no_grad():
        results = for_each_number((1, 2, 3, 5), lambda: layer(x))
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("tokens", [2, 150])
def test_an_exception_that_the_router_raises_reaches_the_caller(tokens):
    reference, layer = layers()
    x = torch.randn(1, tokens, 24)
    handle = layer.router.register_forward_pre_hook(lambda *args: {}["the router's own"])
    with torch.no_grad():
        for _ in range(3):
            with pytest.raises(KeyError, match="the router's own"):
                layer(x)
        handle.remove()
        torch.testing.assert_close(layer(x), reference(x))


def test_autocast_rounds_like_the_reference(taken):
    reference, layer = layers()
    x = torch.randn(2, 5, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.float32 and taken == [True]
        torch.testing.assert_close(y, reference(x), rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_works_for_other_inputs():
    reference, layer = layers()
    x, other = torch.randn(1, 4, 24), torch.randn(1, 4, 24)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
        torch.testing.assert_close(traced(other), reference(other))


def test_vmap_raises_as_in_the_reference():
    reference, layer = layers()
    x = torch.randn(3, 1, 4, 24)
    for each in (reference, layer):
        with torch.no_grad(), pytest.raises(RuntimeError):
            torch.func.vmap(each)(x)


class Elsewhere(torch.Tensor):
    """A weight that keeps its data in another tensor, as quantized weights do."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data):
        self.data_elsewhere = data

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args = [a.data_elsewhere if isinstance(a, Elsewhere) else a for a in args]
        result = function(*args, **(kwargs or {}))
        return Elsewhere(result) if function is torch.ops.aten.detach.default else result


@pytest.mark.parametrize("part", ["routed_experts", "shared_experts", "router"])
def test_weights_of_another_class_run_on_the_reference(taken, part):
    reference, layer = layers()
    x = torch.randn(1, 9, 24)
    with torch.no_grad():
        expected = reference(x)
        linears = [layer.router] if part == "router" else [getattr(layer, part)[1].up, getattr(layer, part)[0].down]
        for linear in linears:
            linear.weight = nn.Parameter(Elsewhere(linear.weight.detach()), requires_grad=False)
        torch.testing.assert_close(layer(x), expected)
    assert taken == [part == "router"]  # the router is called, its weight is not read


@pytest.mark.parametrize("part", ["routed_experts", "shared_experts"])
def test_dtype_mismatch_raises_the_references_error(part):
    _, layer = layers()
    for expert in getattr(layer, part):
        expert.double()
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(1, 9, 24))


@pytest.mark.parametrize("freed", [False, True])
@pytest.mark.parametrize("part", ["routed_experts", "shared_experts"])
def test_weights_that_a_hook_restores(taken, part, freed):
    """Sharded training gathers weights in a hook. Until then their memory is freed, or holds something else."""
    reference, layer = layers()
    x = torch.randn(1, 9, 24)

    def bring_back(expert, args):
        storage, held = expert.up.weight.untyped_storage(), expert.held
        storage.resize_(held.untyped_storage().nbytes())
        expert.up.weight.data.copy_(held)

    with torch.no_grad():
        expected = reference(x)
        for expert in getattr(layer, part):
            expert.held = expert.up.weight.detach().clone()
            expert.up.weight.zero_()
            if freed:
                expert.up.weight.untyped_storage().resize_(0)
            expert.register_forward_pre_hook(bring_back)
        torch.testing.assert_close(layer(x), expected)
    assert taken == [False]


def test_other_python_threads_run_meanwhile():
    config = SimpleNamespace(dim=512, n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=1024)
    layer = openmythos.moe.MoEFFN(config).eval()
    seen, stop = [], threading.Event()

    def watch():
        while not stop.wait(0.001):
            seen.append(time.perf_counter())

    looked = []

    def look(used):
        weights = [[getattr(layer.routed_experts[e], part).weight for e in used] for part in ("gate", "up", "down")]
        looked.append(time.perf_counter())
        return weights

    shared = [[getattr(e, part).weight for e in layer.shared_experts] for part in ("gate", "up", "down")]
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with torch.no_grad():
            extension.module.moe_inference(torch.randn(6000, 512), layer.router, layer.router_bias, 2, shared, look)
        end = time.perf_counter()
    finally:
        stop.set()
        thread.join()
    assert sum(looked[0] < t < end for t in seen) >= 5
