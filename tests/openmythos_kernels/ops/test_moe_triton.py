"""The moe ops' Triton kernels: what their specifications' cases do not reach (those: tests/triton_on_cpu)."""

import pytest
import torch

from openmythos_kernels.ops.moe import moe_experts
from openmythos_kernels.runtime import backends
from openmythos_kernels.verify.specs import moe_experts as experts_spec
from openmythos_kernels.verify.specs import moe_route as route_spec
from tests.openmythos_kernels.ops.test_moe import cast, lists, make

CPU = torch.device("cpu")
BY_NAME = {d.name: d for d in (*route_spec.SPECIFICATIONS, *experts_spec.SPECIFICATIONS)}
INTERPRETER = pytest.mark.parametrize("triton_mode", ["interpreter"])


@INTERPRETER
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_route_of_what_is_not_finite(triton_mode, value):
    """The reference's choice, or where that leaves a choice between equals, a valid one; topk_weights NaN where its
    are."""
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    logits[1, 4], logits[2, [0, 7]], logits[3] = value, value, value
    op = BY_NAME["moe_route"]
    with backends.forcing("triton"):
        found = op.fast(logits=logits, bias=torch.zeros(9), k=3)
    expected = op.reference(logits=logits, bias=torch.zeros(9), k=3)
    assert (found["expert_idx"] >= 0).all() and (found["expert_idx"] < 9).all()
    assert all(len(set(row)) == 3 for row in found["expert_idx"].tolist())
    at = [logits.gather(1, r["expert_idx"]) for r in (found, expected)]
    torch.testing.assert_close(*at, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found["topk_weights"], expected["topk_weights"], equal_nan=True)


@INTERPRETER
def test_route_takes_the_lower_of_equals(triton_mode):
    with backends.forcing("triton"):
        found = BY_NAME["moe_route"].fast(logits=torch.tensor([[0.0, 2.0, -0.0, 2.0, 1.0]]), bias=torch.zeros(5), k=4)
    assert found["expert_idx"].tolist() == [[1, 3, 4, 0]]


@INTERPRETER
@pytest.mark.parametrize("N", [3, 40])
def test_indices_outside_reach_no_memory(triton_mode, N):
    """A pair without an expert adds nothing, as if its gate were zero."""

    def found():
        return moe_experts(x, layer.idx, layer.topk_weights, *lists(layer))

    layer, x = cast(*make(N, 16, 8, 6, 2, 1), torch.float32, grad=False)
    inside_range = layer.idx.clone()
    layer.topk_weights[:, 1] = 0
    with torch.no_grad(), backends.forcing("triton"):
        expected = found()
        layer.topk_weights[:, 1] = float("nan")
        for wild in (-1, 6, 2**40):
            layer.idx = inside_range.clone()
            layer.idx[:, 1] = wild
            torch.testing.assert_close(found(), expected)


@INTERPRETER
def test_launches_do_not_depend_on_sizes(triton_mode):
    from openmythos_kernels.verify.traffic import traffic

    seen, d = set(), BY_NAME["moe_experts"]
    for tokens, experts, k in ((17, 4, 2), (40, 7, 3), (19, 3, 1)):
        sizes = dict(tokens=tokens, dim=16, inner=8, experts=experts, k=k, shared=1)
        inputs = d.make(sizes, torch.float32, CPU, torch.Generator().manual_seed(0))
        inputs["x"].requires_grad_()
        with backends.forcing("triton"), traffic() as launches:
            moe_experts(**inputs).sum().backward()
        seen.add(tuple(x.kernel for x in launches))
    assert len(seen) == 1, seen


@INTERPRETER
def test_few_tokens_read_each_chosen_weight_once(triton_mode):
    """Decoding is as fast as weights come: no expert that is not chosen, none twice, little besides."""
    from benchmarks.suites import traffic

    assert 1.0 <= traffic.weights_read() <= 1.1


@INTERPRETER
@pytest.mark.parametrize("N", [3, 20])
def test_weights_further_apart_than_32_bits_count(triton_mode, N):
    """Experts wherever memory has room for them: more than 2^31 elements ahead of the first and behind it."""
    layer, x = cast(*make(N, 16, 8, 3, 2, 1), torch.float16, grad=False)
    each = 2**31 + 8192
    # Memory that nobody touches costs nothing.
    before, behind = torch.empty(0, dtype=torch.float16).set_(torch.UntypedStorage(4 * each)).view(2, each)

    def far(weights, place):
        """The first in the middle, one at the beginning, one at the end."""
        ends = (behind[place:], before[place:], behind[-place - 1024 :])
        return [end[: w.numel()].view_as(w).copy_(w) for end, w in zip(ends, weights)]

    with torch.no_grad(), backends.forcing("triton"):
        gate, up, down, *shared = lists(layer)
        expected = moe_experts(x, layer.idx, layer.topk_weights, gate, up, down, *shared)
        moved = far(gate, 0), far(up, 1024), far(down, 2048)
        assert max(abs(w.data_ptr() - ws[0].data_ptr()) for ws in moved for w in ws) > 2 * 2**31
        found = moe_experts(x, layer.idx, layer.topk_weights, *moved, *shared)
    assert torch.equal(found, expected)


def test_the_host_reads_nothing(monkeypatch):
    """Launched on tensors without data, forward and backward: a look at a value would raise."""
    jit = pytest.importorskip("triton.runtime.jit")
    launched = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *args, **kwargs: launched.append(self.fn.__name__))
    for op, sizes in (
        ("moe_experts", dict(tokens=300, dim=48, inner=32, experts=6, k=2, shared=2)),
        ("moe_experts", dict(tokens=4, dim=48, inner=32, experts=6, k=2, shared=2)),
        ("moe_route", dict(tokens=300, experts=6, k=2)),
        ("moe_sort", dict(tokens=300, experts=6, k=2)),
    ):
        d = BY_NAME[op]
        inputs = d.make(sizes, torch.bfloat16, torch.device("meta"), None)
        wanted = [
            x for name in d.differentiable for x in (inputs[name] if isinstance(inputs[name], list) else [inputs[name]])
        ]
        for x in wanted:
            x.requires_grad_()
        with backends.forcing("triton"):
            outputs = [y for y in d.fast(**inputs).values() if y.requires_grad]
            if outputs:
                torch.autograd.grad(outputs, wanted, [torch.empty_like(y) for y in outputs])
    assert {
        "few_up_kernel",
        "up_weights_kernel",
        "gate_gradient_kernel",
        "route_backward_kernel",
        "place_kernel",
    } <= set(launched)
