"""Trains a small byte-level model for a few seconds, then prints its text as it is sampled.

python examples/generate.py [--prompt "def "] [--steps 150] [--new 120] [--loops 4]
"""

from __future__ import annotations

import argparse
import sys

import torch

import openmythos_kernels
from openmythos import KVCache, MythosConfig, OpenMythos, stream
from openmythos.training import VOCABULARY, Batches, corpus, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--steps", type=int, default=150, help="training steps before sampling")
    parser.add_argument("--new", type=int, default=120, help="bytes to sample")
    parser.add_argument("--loops", type=int, default=4, help="loops per token; any number works at inference")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = MythosConfig(
        vocab_size=VOCABULARY,
        dim=128,
        n_heads=2,
        max_seq_len=1024,
        max_loop_iters=4,
        kv_lora_rank=48,
        q_lora_rank=64,
        n_experts=8,
        expert_dim=64,
        prelude_layers=1,
        coda_layers=1,
        halting="off",
    )
    model = openmythos_kernels.accelerate(OpenMythos(config))
    for step in train(model, Batches(corpus().train, batch=8, tokens=64), options.steps):
        print(f"\rtraining: step {step.step}, loss {step.loss:.3f} nats per byte", end="", file=sys.stderr)
    print(file=sys.stderr)

    model.eval()
    prompt = torch.tensor([list(options.prompt.encode())])
    print(options.prompt, end="")
    for token in stream(model, prompt, options.new, n_loops=options.loops, temperature=0.7, top_p=0.9, seed=0):
        print(chr(int(token)) if int(token) < 128 else "?", end="", flush=True)
    print()

    cache = KVCache(capacity=prompt.shape[1])
    with torch.no_grad():
        model(prompt, n_loops=options.loops, kv_cache=cache)
    print(f"the cache takes {cache.nbytes() / prompt.shape[1]:.0f} bytes per token at {options.loops} loops")


if __name__ == "__main__":
    main()
