"""Which target a GPU is, by its compute capability."""

import pytest

from openmythos_kernels.runtime import target


@pytest.mark.parametrize(
    "capability, name",
    [
        ((7, 5), "sm_80"),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), "sm_100"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((13, 0), "sm_120"),
    ],
)
def test_of_a_gpu(capability, name, monkeypatch):
    monkeypatch.setattr(target.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(target.torch.cuda, "get_device_capability", lambda: capability)
    assert target.current().name == name


def test_blocks_fit_their_multiprocessor():
    for limits in target.TARGETS.values():
        assert limits.shared_memory <= limits.shared_memory_per_unit
    assert {target.TARGETS[name].shared_memory for name in ("sm_86", "sm_120")} == {99 << 10}
