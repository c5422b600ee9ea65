"""The swap in a script of Hugging Face Accelerate: one more line before `prepare`.

accelerate launch examples/swap_with_accelerate.py [--steps 10]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator

import openmythos_kernels
from openmythos import MythosConfig, OpenMythos, update_router_bias
from openmythos.training import VOCABULARY, Batches, corpus, make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    accelerator = Accelerator()

    torch.manual_seed(0)
    cfg = MythosConfig(
        vocab_size=VOCABULARY, dim=64, n_heads=2, n_experts=8, expert_dim=32, prelude_layers=1, coda_layers=1,
        max_seq_len=64, max_loop_iters=4, kv_lora_rank=32, q_lora_rank=32, halting="off",
    )  # fmt: skip
    model = OpenMythos(cfg)
    openmythos_kernels.accelerate(model)  # the one new line
    model, optimizer = accelerator.prepare(model, make_optimizer(model))

    data = Batches(corpus().train, 2, 64, seed=accelerator.process_index, device=accelerator.device)
    for step in range(options.steps):
        inputs, targets = data[step]
        loss = F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_router_bias(model)
        accelerator.print(f"step {step}: loss {accelerator.reduce(loss.detach(), 'mean').item():.4f}")


if __name__ == "__main__":
    main()
