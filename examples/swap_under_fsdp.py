"""The swap in a script that shards its model itself (FSDP2): one more line, the same losses.

torchrun --nproc-per-node 2 examples/swap_under_fsdp.py [--steps 10]
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard

import openmythos_kernels
from openmythos import MythosConfig, OpenMythos, update_router_bias
from openmythos.training import VOCABULARY, Batches, corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    cfg = MythosConfig(
        vocab_size=VOCABULARY, dim=64, n_heads=2, n_experts=8, expert_dim=32, prelude_layers=1, coda_layers=1,
        max_seq_len=64, max_loop_iters=4, kv_lora_rank=32, q_lora_rank=32, halting="off",
    )  # fmt: skip
    model = OpenMythos(cfg).to(device)
    openmythos_kernels.accelerate(model)  # the one new line
    # The recurrent block is one unit that stays gathered: no rank waits for another inside the loop.
    for block in (*model.prelude, *model.coda):
        fully_shard(block)
    fully_shard(model.recurrent, reshard_after_forward=False)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    data = Batches(corpus().train, batch=2, tokens=64, seed=dist.get_rank(), device=device)
    for step in range(options.steps):
        inputs, targets = data[step]
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_router_bias(model)
        dist.all_reduce(mean := loss.detach().clone())
        if dist.get_rank() == 0:
            print(f"step {step}: loss {mean.item() / dist.get_world_size():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
