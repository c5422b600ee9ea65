"""When a loop may stop, without stalling the host.

Whether positions still run is known on the device; asking for it at every loop would make the host wait for the
device, and the device for the host. So the count is copied to pinned memory as soon as it is made, and looked at a
few loops later, when it has long arrived. A late exit costs loops of zero weight and changes nothing: a position
that has halted adds nothing to the output.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ExitCounter:
    """Counts of running positions, recorded now and read `lag` records later.

    On a CPU the numbers are at hand, but the answer comes as late as it would on a GPU, so that both run the same
    loops for the same `lag`; 0 asks about the newest record.

    Args:
        lag: how many records later a count is looked at.

    Raises:
        ValueError: lag is negative.
    """

    def __init__(self, lag: int = 2):
        if lag < 0:
            raise ValueError(f"lag = {lag}: must be at least 0")
        self.lag = lag
        self._slots: list[_Slot] = []
        self._records = 0

    def record(self, count: Tensor) -> None:
        """Notes a loop's count: (1,) int64 on any device, as `compact_active(...).total`. Does not wait."""
        if len(self._slots) <= self.lag:
            self._slots.append(_Slot(count.device))
        self._slots[self._records % (self.lag + 1)].write(count)
        self._records += 1

    def finished(self) -> bool:
        """Whether nothing was running `lag` records ago; then nothing can be running now."""
        if self._records <= self.lag:
            return False
        return self._slots[(self._records - 1 - self.lag) % (self.lag + 1)].read() == 0


class _Slot:
    """One number on its way from the device."""

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        self._host = torch.empty(1, dtype=torch.int64, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None

    def write(self, count: Tensor) -> None:
        self._host.copy_(count.detach(), non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(count.device))

    def read(self) -> int:
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._host)
