"""Early exit from the loop without stalling the host.

Only the device knows whether positions still run, and reading that in every loop would make host and device wait for
each other. So the count goes to pinned memory as soon as it is made, and the host reads it a few loops later, when it
has arrived. A late exit costs loops and changes nothing: a halted position adds nothing to the output.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ExitCounter:
    """Counts of running positions, each read `lag` records after it was recorded.

    On a CPU the answer is as late as on a GPU, so that both run the same loops for the same `lag`.

    Args:
        lag: how many records late a count is read; 0 reads the newest record.

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
        """Records a loop's count, (1,) int64 on any device such as `compact_active(...).total`, without waiting."""
        if len(self._slots) <= self.lag:
            self._slots.append(_Slot(count.device))
        self._slots[self._records % (self.lag + 1)].write(count)
        self._records += 1

    def finished(self) -> bool:
        """True if nothing ran `lag` records ago, so that nothing can be running now."""
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
