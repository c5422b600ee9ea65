"""The extension's `is_causal`: whether a tensor is the causal mask for a given start, in any layout."""

import pytest
import torch

from openmythos_kernels.runtime import extension
from tests.kit.dtypes import ALL
from tests.kit.threads import for_each_number

SHAPES = ((1, 1), (1, 7), (5, 5), (4, 9), (9, 4), (70, 300))


def is_causal(mask, start):
    return extension.module.is_causal(mask, start)


def causal(T, S, start, dtype=torch.float32):
    seen = torch.arange(S) <= start + torch.arange(T)[:, None]
    return torch.zeros(T, S, dtype=dtype).masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("T, S", SHAPES)
def test_a_mask_is_causal_for_its_start_only(T, S, dtype):
    for start in (-T - 3, -1, 0, 3, S - T, S + 9, 2**62, -(2**62)):
        mask = causal(T, S, max(min(start, S), -T), dtype)
        assert is_causal(mask, start) and is_causal(mask.where(mask != 0, -0.0), start)
        for other in (start - 1, start + 1):
            assert is_causal(mask, other) == mask.equal(causal(T, S, max(min(other, S), -T), dtype))


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_a_single_wrong_value_is_found(dtype):
    mask = causal(6, 40, 20, dtype)
    assert is_causal(mask, 20)
    for value in (
        torch.nan,
        torch.inf,
        1.0,
        torch.finfo(dtype).min,
        torch.finfo(dtype).smallest_normal * 0.5,
        0.0,
        -torch.inf,
    ):
        for i, j in ((0, 0), (0, 20), (0, 21), (3, 39), (5, 25), (5, 26), (5, 39)):
            other = mask.clone()
            other[i, j] = value
            assert is_causal(other, 20) == other.equal(mask), (value, i, j)


@pytest.mark.parametrize("T, S", SHAPES)
def test_any_layout(T, S):
    mask = causal(T, S, S - T)
    strided = torch.full((T, 2, S, 3), torch.nan)
    strided[:, 1, :, 2] = mask
    layouts = (
        mask[None, None],
        mask.expand(3, 4, T, S),
        mask.repeat(2, 3, 1, 1),
        mask.repeat(2, 1, 1, 1).expand(2, 5, T, S),
        mask.t().contiguous().t(),
        strided[:, 1, :, 2],
        torch._neg_view(-mask),
    )
    for laid in layouts:
        assert is_causal(laid, S - T)
    of_many = mask.repeat(3, 2, 1, 1)
    of_many[2, 1, T - 1, 0] = 1.0
    assert not is_causal(of_many, S - T)
    assert is_causal(torch.zeros(1, 1).expand(T, S), S)


def test_an_empty_mask_is_causal():
    assert all(is_causal(torch.ones(*shape), 0) for shape in ((0, 5), (5, 0), (0, 3, 3)))


def test_any_number_of_threads():
    mask = causal(700, 700, 0).expand(2, 700, 700)
    wrong = mask.clone()
    wrong[1, 699, 0] = 1.0
    found = for_each_number((1, 2, 3), lambda: (is_causal(mask, 0), is_causal(wrong, 0)))
    assert found == [(True, False)] * 3


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(3),
        torch.zeros(3, 3, dtype=torch.bool),
        torch.zeros(3, 3, device="meta"),
        torch.zeros(3, 3).to_sparse(),
    ],
    ids=["a row", "bool", "meta", "sparse"],
)
def test_a_tensor_that_is_no_mask_raises(mask):
    with pytest.raises(ValueError, match="mask must be"):
        is_causal(mask, 0)
