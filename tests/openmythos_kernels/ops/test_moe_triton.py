"""The moe ops' Triton kernels: what their descriptions' cases do not reach (those: tests/triton_on_cpu)."""

import pytest
import torch

from openmythos_kernels.ops.moe import describe_experts, describe_route, moe_experts
from openmythos_kernels.runtime import backends
from tests.openmythos_kernels.ops.test_moe import cast, lists, make

CPU = torch.device("cpu")
BY_NAME = {d.name: d for d in (*describe_route.DESCRIPTIONS, *describe_experts.DESCRIPTIONS)}
INTERPRETER = pytest.mark.parametrize("triton_mode", ["interpreter"])


@INTERPRETER
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_route_of_what_is_not_finite(triton_mode, value):
    """The reference's choice, or where that leaves a choice between equals, a valid one; gates NaN where its are."""
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
    torch.testing.assert_close(found["gates"], expected["gates"], equal_nan=True)


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
        return moe_experts(x, layer.idx, layer.gates, *lists(layer))

    layer, x = cast(*make(N, 16, 8, 6, 2, 1), torch.float32, grad=False)
    inside_range = layer.idx.clone()
    layer.gates[:, 1] = 0
    with torch.no_grad(), backends.forcing("triton"):
        expected = found()
        layer.gates[:, 1] = float("nan")
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
