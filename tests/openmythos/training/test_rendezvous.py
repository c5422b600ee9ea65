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
    store.set_timeout(timedelta(seconds=20))
    attempts = [names(store, order) for _ in range(3)]
    assert all(len(set(found)) == 1 for found in attempts)
    assert len({found[0] for found in attempts}) == 3


def test_a_rank_does_not_wait_for_ever():
    with pytest.raises(dist.DistStoreError, match=r"rank 1: rank 0 has not come within 0\.3 s"):
        attempt(dist.HashStore(), 1, 2, timeout=0.3)


def test_a_name_that_its_rank_0_did_not_live_to_confirm_is_not_believed():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    store.set("openmythos/first", "broken")
    with pytest.raises(dist.DistStoreError):
        attempt(store, 1, 2, timeout=0.3)
    first, second = names(store, (1, 0))
    assert first == second != "broken"
