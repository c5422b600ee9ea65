"""The swap in a training script of the `open-mythos` package that shards its model by FSDP: one more line.

torchrun --nproc-per-node 2 examples/swap_under_fsdp.py [--steps 10] [--reference]

Apart from that line the script is in the form of the package's own trainer: its model, its wrap policy, whole weights
at the end. There, ranks whose texts halt after different numbers of loops send what the other does not expect, and hang
or fail. After the swap all ranks run the same loops; what has halted on one of them computes next to nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_mythos import MythosConfig, OpenMythos
from open_mythos.main import RecurrentBlock, TransformerBlock
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import openmythos_kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64, help="per row; a rank's batch has two rows")
    parser.add_argument("--dim", type=int, default=64, help="model width, a multiple of 32")
    parser.add_argument("--text", nargs="+", help="files, divided over ranks; default: Python's standard library")
    parser.add_argument("--weights", help="file with the weights to begin with")
    parser.add_argument("--out", help="file for the trained weights")
    parser.add_argument("--reference", action="store_true", help="without the swap")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    files = options.text or sorted(Path(os.__file__).parent.glob("*.py"))
    text = b"".join(Path(file).read_bytes() for file in files[rank::ranks])  # other text on every rank
    text = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    torch.manual_seed(0)  # the same weights on every rank
    cfg = MythosConfig(
        vocab_size=256, dim=options.dim, n_heads=options.dim // 32, n_experts=8, expert_dim=options.dim // 2,
        prelude_layers=1, coda_layers=1,
        max_seq_len=options.tokens, max_loop_iters=4, attn_type="mla", kv_lora_rank=32, q_lora_rank=32,
    )  # fmt: skip
    model = OpenMythos(cfg).to(device)
    if options.weights:
        model.load_state_dict(torch.load(options.weights))
    if not options.reference:
        openmythos_kernels.accelerate(model)  # the one new line
    policy = ModuleWrapPolicy({TransformerBlock, RecurrentBlock})
    # With original parameters FSDP lends a module its whole weights, which the fast modules read.
    model = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=device, use_orig_params=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)

    draw = torch.Generator().manual_seed(rank)
    for step in range(options.steps):
        began = time.perf_counter()
        starts = torch.randint(len(text) - options.tokens, (2,), generator=draw)
        rows = torch.stack([text[start : start + options.tokens + 1] for start in starts.tolist()]).long().to(device)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        model.clip_grad_norm_(1.0)
        optimizer.step()
        dist.all_reduce(mean := loss.detach().clone())
        rate = rows[:, 1:].numel() * ranks / (time.perf_counter() - began)
        if rank == 0:
            print(f"step {step}: loss {mean.item() / ranks:.6f}, {rate:.0f} tokens/s")
    whole = StateDictOptions(full_state_dict=True, cpu_offload=gpu)
    weights = get_model_state_dict(model, options=whole)  # names and shapes of the package: an unswapped model loads it
    if rank == 0 and options.out:
        torch.save(weights, options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
