"""Runs a function on several ranks, processes of one gloo group."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(work, *args, ranks: int = 2, timeout: float = 300.0) -> list:
    """Runs `work(rank, *args)` on every rank and returns the results in the order of the ranks.

    Raises:
        TimeoutError: a rank has not ended in time; all ranks are killed.
        Exception: whatever a rank raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The fork server imports PyTorch once for all ranks of this process.
        mp.set_forkserver_preload(["openmythos_kernels", "torch.distributed.fsdp", "torch._dynamo", "pytest"])
        arguments = work, args, ranks, folder
        context = mp.start_processes(_start, arguments, nprocs=ranks, join=False, start_method="forkserver")
        end = time.monotonic() + timeout
        try:
            while not context.join(timeout=max(0.1, end - time.monotonic())):
                if time.monotonic() >= end:
                    raise TimeoutError(f"ranks still running after {timeout} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [pickle.loads((Path(folder) / f"result{rank}").read_bytes()) for rank in range(ranks)]


def _start(rank: int, work, args, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        result = work(rank, *args)
        (Path(folder) / f"result{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # Skip the interpreter's teardown, in which a thread of the process group sometimes aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
