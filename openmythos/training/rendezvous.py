"""How the ranks of a run meet under `torchrun`, whichever attempt this is.

`torchrun --max-restarts` starts all ranks again when one has died, but keeps the store in which ranks look each other
up. A rank that starts before another one then finds the address of the other's dead predecessor, and cannot connect.
"""

from __future__ import annotations

import os
import time
import uuid

import torch.distributed as dist

_FIRST = "openmythos/first"  # the key of the attempt's name, as rank 0 gives it


def join(backend: str) -> None:
    """Makes the default process group of the ranks that `torchrun`, or whatever sets its variables, describes."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    store, rank, ranks = next(dist.rendezvous("env://"))
    fresh = dist.PrefixStore(attempt(store, rank, ranks), store)
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=ranks)


def attempt(store: dist.Store, rank: int, ranks: int, timeout: float = 1800.0, interval: float = 0.02) -> str:
    """A name that all ranks of this attempt share, and no earlier one had.

    Rank 0 draws it. Another rank may read the name of an earlier attempt, so it answers with a mark of its own, and
    believes a name only when rank 0 has confirmed that mark.

    Args:
        store: holds what earlier attempts have left in it.
        timeout: seconds until a rank gives up on rank 0; rank 0 waits as long as the store does.
        interval: seconds between two looks at the store.

    Raises:
        dist.DistStoreError: a rank has not come in time.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set(_FIRST, mine)
        for other in range(1, ranks):
            mark = store.get(f"{mine}/{other}").decode()  # waits for it
            store.set(f"{mine}/{mark}", "")
        return mine
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if store.check([_FIRST]):
            name = store.get(_FIRST).decode()
            store.set(f"{name}/{rank}", mine)
            if store.check([f"{name}/{mine}"]):
                return name
        time.sleep(interval)
    raise dist.DistStoreError(f"rank {rank}: rank 0 has not come within {timeout} s")
