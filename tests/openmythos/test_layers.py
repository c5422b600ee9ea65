import math

import pytest
import torch

import openmythos
from openmythos import Expert, RMSNorm
from openmythos.layers import apply_rope, rotary_table
from openmythos_kernels import accelerate
from tests.kit.tiny import relative, tiny_model, tokens
from tests.kit.upstream import load_upstream


@pytest.mark.parametrize(
    "dtype, close", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)]
)
def test_rmsnorm(dtype, close):
    norm = RMSNorm(33).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 33).to(dtype)
    wide = x.double()
    expected = torch.stack([row / math.sqrt(float((row**2).sum()) / 33 + 1e-6) for row in wide.view(10, 33)])
    out = norm(x)
    assert out.dtype == dtype and out.shape == x.shape
    assert relative(out.view(10, 33), expected * norm.weight.double()) < close


def test_rmsnorm_takes_squares_in_float32():
    """300^2 overflows in float16, and 1e-3 squared loses its digits."""
    norm = RMSNorm(8).half()
    assert torch.equal(norm(torch.full((1, 8), 300.0).half()), torch.ones(1, 8).half())
    assert relative(norm(torch.full((1, 8), 1e-3).half()), torch.full((1, 8), math.sqrt(0.5))) < 1e-2


def test_rotary_table():
    table = rotary_table(6, 9, 100.0)
    assert table.dtype == torch.complex64 and table.shape == (9, 3)
    for position in range(9):
        for k in range(3):
            angle = position * 100.0 ** (-2 * k / 6)
            assert abs(complex(table[position, k]) - complex(math.cos(angle), math.sin(angle))) < 1e-6


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-7), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_rope_rotates_adjacent_pairs(dtype, close):
    table = rotary_table(6, 9, 100.0)
    x = torch.randn(2, 4, 3, 6).to(dtype)
    out = apply_rope(x, table[2:6])
    assert out.dtype == dtype
    pairs = torch.complex(x.double()[..., 0::2], x.double()[..., 1::2]) * table[2:6].to(torch.complex128)[:, None]
    assert relative(out[..., 0::2], pairs.real) < close and relative(out[..., 1::2], pairs.imag) < close


def test_rope_with_positions_per_row():
    table = rotary_table(4, 9, 100.0)
    x = torch.randn(2, 3, 2, 4)
    rows = torch.stack((table[1:4], table[5:8]))
    assert torch.equal(apply_rope(x, rows), torch.cat((apply_rope(x[:1], table[1:4]), apply_rope(x[1:], table[5:8]))))


def test_rope_scores_depend_on_distance_alone():
    table = rotary_table(8, 40, 1000.0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    scores = [(apply_rope(q, table[p + 3 : p + 4]) * apply_rope(k, table[p : p + 1])).sum() for p in (0, 11, 36)]
    assert max(scores) - min(scores) < 1e-5


def test_expert():
    expert = Expert(5, 7)
    x = torch.randn(2, 3, 5)
    gate, up = x @ expert.gate.weight.T, x @ expert.up.weight.T
    torch.testing.assert_close(expert(x), (gate / (1 + torch.exp(-gate)) * up) @ expert.down.weight.T)
    assert expert(x[:, :0]).shape == (2, 0, 5)


def test_open_mythos_names():
    theirs = load_upstream()
    for arguments in (dict(dim=16, max_len=32), dict(dim=8, max_len=5, theta=100.0)):
        assert torch.equal(openmythos.precompute_rope_freqs(**arguments), theirs.precompute_rope_freqs(**arguments))
    x, table = torch.randn(2, 5, 3, 8), theirs.precompute_rope_freqs(8, 5)
    torch.testing.assert_close(openmythos.apply_rope(x, table), theirs.apply_rope(x, table))


@pytest.mark.parametrize("fast", [False, True])
def test_tables_in_double_precision(fast):
    """Tables that were replaced by complex128 ones are used as they are."""
    model, ids = tiny_model(), tokens(2, 9)
    want = model(ids)
    model = accelerate(model) if fast else model
    for name in ("freqs_cis", "freqs_cis_mla"):
        model._buffers[name] = model._buffers[name].to(torch.complex128)
    assert relative(model(ids), want) < 1e-5
    cache = {}
    with torch.no_grad():
        assert relative(model(ids), want) < 1e-5
        got = [model(ids[:, i:j], kv_cache=cache, start_pos=i) for i, j in ((0, 4), (4, 7), (7, 8), (8, 9))]
    assert relative(torch.cat(got, 1), want) < 1e-5
    angles = torch.outer(torch.arange(24).double(), 1 / 500000 ** (torch.arange(0, 4, 2).double() / 4))
    model.double()._buffers["freqs_cis_mla"] = torch.polar(torch.ones_like(angles), angles)
    assert 1e-9 < relative(model(ids), tiny_model().double()(ids)) < 1e-5  # with angles that float32 cannot hold
