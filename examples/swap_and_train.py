"""Trains one small model twice, with the reference's modules and with the fast ones, and compares losses and speed.

python examples/swap_and_train.py [--steps 40] [--tokens 128] [--dim 192]
"""

from __future__ import annotations

import argparse
import copy

import torch

import openmythos_kernels
from openmythos import MythosConfig, OpenMythos
from openmythos.training import VOCABULARY, Batches, corpus, evaluate, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=128, help="per row; a batch has two rows")
    parser.add_argument("--dim", type=int, default=192, help="model width, a multiple of 64")
    options = parser.parse_args()

    torch.manual_seed(0)
    reference = OpenMythos(
        MythosConfig(
            vocab_size=VOCABULARY,  # a token is a byte
            dim=options.dim,
            n_heads=options.dim // 64,
            max_seq_len=options.tokens,
            max_loop_iters=4,
            n_experts=16,
            expert_dim=options.dim // 2,
            prelude_layers=1,
            coda_layers=1,
            halting="off",  # every position runs all four loops
        )
    )
    fast = openmythos_kernels.accelerate(copy.deepcopy(reference))

    text = corpus()  # the modules of Python's standard library
    data = Batches(text.train, batch=2, tokens=options.tokens)
    losses = {}
    for name, model in {"reference": reference, "accelerated": fast}.items():
        steps = list(train(model, data, options.steps))
        losses[name] = [step.loss for step in steps]
        speeds = sorted(step.tokens_per_second for step in steps)
        held_out = evaluate(model, Batches(text.validation, 2, options.tokens), batches=2)
        print(
            f"{name:12} loss {losses[name][0]:.3f} -> {losses[name][-1]:.3f}, validation {held_out:.3f}, "
            f"{speeds[len(speeds) // 2]:.0f} tokens/s (median)"
        )
    apart = max(abs(a - b) for a, b in zip(losses["reference"], losses["accelerated"]))
    print(f"losses are at most {apart:.1e} apart")


if __name__ == "__main__":
    main()
