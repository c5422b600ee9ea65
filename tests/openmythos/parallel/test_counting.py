"""The count of what ranks send, against what four ranks give to collectives."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from openmythos import variants
from openmythos.parallel import Plan, counting
from tests.kit.ranks import run_ranks
from tests.kit.tiny import tiny_config
from tests.openmythos.parallel.work import BATCH, FIELDS, make, optimizer_of, train

NAMES = {
    "alltoall_base_": "all_to_all",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
}
PLANS = [Plan(expert=4), Plan(data=2, shard=2, expert=2), Plan(shard=4)]


class Given(TorchDispatchMode):
    """Bytes and number of collectives of each kind."""

    def __init__(self):
        super().__init__()
        self.bytes, self.times = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and (name := NAMES.get(func._opname)):
            given = args[0] if name == "all_reduce" else [args[1]]
            self.bytes[name] += sum(x.numel() * x.element_size() for x in given)
            self.times[name] += 1
        return func(*args, **(kwargs or {}))


def _count(rank: int, plans, fields, options):
    found = []
    for plan in plans:
        model = make(plan=plan, **fields)
        optimizer = optimizer_of(model)
        train(model, optimizer, range(2), **options)  # DDP arranges its buckets
        with Given() as one:
            train(model, optimizer, range(1), **options)
        with Given() as two:
            train(model, optimizer, range(2), **options)
        found.append((two.bytes - one.bytes, two.times - one.times))
    return found


@pytest.mark.parametrize("checkpoint_loops", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_four_ranks_give_what_was_counted(checkpoint_loops):
    fields = {"act_threshold": 100.0}  # nothing halts
    options = {"loops": 3, "grad_loops": 2, "checkpoint_loops": checkpoint_loops}
    cfg = tiny_config(**{**FIELDS, **fields})
    each_rank = run_ranks(_count, PLANS, fields, options, ranks=4)
    for plan, *given in zip(PLANS, *each_rank):
        rows = counting.traffic(
            cfg, plan, 4, BATCH // 4 * 9, n_loops=3, grad_loops=2, checkpoint_loops=checkpoint_loops
        )
        for name in NAMES.values():
            wanted = [row for row in rows if row.collective == name]
            all_bytes = sum(b[name] for b, _ in given) / 4
            expected = sum(row.given * row.times for row in wanted)
            # Not counted: single numbers, of the gradient's norm and the mean of the loss.
            slack = 64 if name == "all_reduce" else 0
            assert expected == pytest.approx(all_bytes, abs=slack), (plan, name)
            if name != "all_reduce":
                assert {t[name] for _, t in given} == {sum(row.times for row in wanted)}, (plan, name)


def test_no_size_takes_long():
    began = time.perf_counter()
    cfg = variants.mythos_1t()
    held = counting.held(cfg, Plan(shard=512, expert=64), 512)
    assert held.parameters < 2 * 4e12 / 64
    assert "tokens to experts" in counting.table(counting.traffic(cfg, Plan(shard=512, expert=64), 512, 8192))
    assert time.perf_counter() - began < 20
