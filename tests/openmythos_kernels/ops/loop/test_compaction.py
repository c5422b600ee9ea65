"""Compaction, gathers and scatters of running rows, on the CPU."""

import pytest
import torch

from openmythos_kernels.ops.loop import compact_active, compaction, gather_rows, scatter_rows

SHAPES = [(3, 41), (1, 1), (0, 3), (2, 0), (2, 1031)]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("B, T", SHAPES)
def test_compact_active(B, T, share):
    running = torch.rand(B, T) < share
    got = compact_active(running)
    listed = running.flatten().nonzero().flatten()
    assert torch.equal(got.index[: len(listed)], listed) and (got.index[len(listed) :] == -1).all()
    assert got.index.shape == (B * T,) and got.total.tolist() == [len(listed)]
    assert torch.equal(got.counts, running.sum(1))
    assert got.last.tolist() == [max(row.nonzero().flatten().tolist(), default=-1) for row in running]
    for a, b in zip(got, compaction._plain_compact(running), strict=True):
        assert a.dtype == b.dtype == torch.int64 and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("N, D", [(7, 5), (1, 1), (0, 3), (5, 0), (301, 17)])
def test_gather_and_scatter_equal_indexing(N, D, dtype):
    x, base = (torch.randn(N, D).to(dtype) for _ in range(2))
    index = torch.randperm(N)[: N // 2]
    index = torch.cat([index, torch.tensor([-1, N, 2**40])])
    inside = slice(0, N // 2)
    rows = gather_rows(x, index)
    assert torch.equal(rows[inside], x[index[inside]]) and not rows[N // 2 :].any()
    expected = base.clone()
    expected[index[inside]] = rows[inside]
    assert torch.equal(scatter_rows(base, rows, index), expected)
    assert torch.equal(compaction._plain_gather(x, index), rows)
    assert torch.equal(compaction._plain_scatter(base, rows, index, N), expected)


def test_gradients():
    x, base = (torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    index = torch.tensor([4, 0, -1, 5])
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, index), x)
    assert torch.autograd.gradcheck(lambda base, x: scatter_rows(base, x[:4], index), (base, x))


@pytest.mark.parametrize("op", ["compact", "gather", "scatter"])
def test_opcheck(op):
    x, index = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([3, -1, 0])
    arguments = {
        "compact": (compaction.COMPACT_ACTIVE, (torch.rand(3, 5) < 0.5,)),
        "gather": (compaction.GATHER_ROWS, (x, index)),
        "scatter": (compaction.SCATTER_ROWS, (x, torch.randn(3, 3, dtype=torch.float64, requires_grad=True), index, 5)),
    }[op]
    torch.library.opcheck(arguments[0].overload, arguments[1])


def test_compiled_equals_eager():
    def function(running, x):
        active = compact_active(running)
        return scatter_rows(x, gather_rows(x, active.index) * 2, active.index)

    running, x = torch.rand(2, 9) < 0.5, torch.randn(18, 4)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(running, x), function(running, x))


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: compact_active(torch.zeros(2, 3)), "running"),
        (lambda: compact_active(torch.zeros(2, dtype=torch.bool)), "running"),
        (lambda: gather_rows(torch.zeros(2), torch.zeros(1, dtype=torch.int64)), "x"),
        (lambda: gather_rows(torch.zeros(2, 3), torch.zeros(1, dtype=torch.int32)), "index"),
        (lambda: scatter_rows(torch.zeros(2, 3), torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)), "rows"),
        (
            lambda: scatter_rows(torch.zeros(2, 3), torch.zeros(1, 3).double(), torch.zeros(1, dtype=torch.int64)),
            "rows",
        ),
    ],
)
def test_wrong_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=f"^{name}: got .* expected "):
        call()
