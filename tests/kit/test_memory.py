"""tests.kit.memory: new memory is poisoned, guards notice writes, layouts keep values."""

import pytest
import torch

from tests.kit.memory import LAYOUTS, Guarded, poison


def test_new_memory_is_nan_in_python_and_in_kernels():
    with poison():
        empty = (
            torch.empty(5),
            torch.empty_like(torch.ones(2, 3)),
            torch.ones(2).new_empty(4),
            torch.empty_strided((2, 2), (1, 2)),
        )
        assert all(x.isnan().all() for x in empty)
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts_keep_values_and_notice_writes(layout):
    inputs = {
        "x": torch.randn(3, 4),
        "lists": [torch.arange(6), torch.ones(2, dtype=torch.bfloat16)],
        "n": 3,
        "none": None,
    }
    guarded = Guarded(layout)
    placed = guarded(inputs)
    assert torch.equal(placed["x"], inputs["x"]) and torch.equal(placed["lists"][1], inputs["lists"][1])
    assert placed["n"] == 3 and placed["none"] is None
    guarded.untouched()
    beside = placed["lists"][0].as_strided((1,), (1,), placed["lists"][0].storage_offset() - 1)
    beside.zero_()
    with pytest.raises(AssertionError, match=r"memory of lists\[0\] were written"):
        guarded.untouched()
