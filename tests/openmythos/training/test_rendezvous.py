"""Ranks that `torchrun` has started again meet each other, not what their predecessors left in the store."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from openmythos.training.rendezvous import attempt


def names(store, order, pause=0.2):
    """What each rank calls the attempt; ranks start in this order."""
    found, threads = {}, []

    def rank(r):
        found[r] = attempt(store, r, len(order))

    for r in order:
        threads.append(threading.Thread(target=rank, args=(r,)))
        threads[-1].start()
        time.sleep(pause)
    for thread in threads:
        thread.join()
    return [found[r] for r in sorted(order)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_every_attempt_has_a_name_of_its_own_that_all_ranks_know(order):
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=60))
    attempts = [names(store, order) for _ in range(3)]
    assert all(len(set(found)) == 1 for found in attempts)
    assert len({found[0] for found in attempts}) == 3


def test_a_rank_waits_for_ever_for_no_one():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.3))
    with pytest.raises(dist.DistStoreError, match=r"rank 1: rank 0 has not come within 0:00:00\.3"):
        attempt(store, 1, 2)


def test_an_attempt_that_broke_off_leaves_no_trace():
    """Rank 1 has answered, and its rank 0 has died before it confirmed."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.3))
    store.set("openmythos/first", "broken")
    with pytest.raises(dist.DistStoreError):
        attempt(store, 1, 2)
    store.set_timeout(timedelta(seconds=60))
    first, second = names(store, (1, 0))
    assert first == second != "broken"
