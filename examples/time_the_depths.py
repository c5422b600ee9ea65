"""Times a decoded token at several numbers of loops, with the reference's modules and with the fast ones.

python examples/time_the_depths.py [--loops 1 2 4 8] [--cached 256] [--tokens 8] [--dim 256]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

import openmythos_kernels
from openmythos import KVCache, MythosConfig, OpenMythos


@torch.no_grad()
def milliseconds(model: OpenMythos, prompt: torch.Tensor, loops: int, tokens: int) -> float:
    """Median milliseconds a token: one prefill of `prompt`, then `tokens` greedy steps."""
    cache = KVCache(capacity=prompt.shape[1] + tokens + 1)
    ids = model(prompt, n_loops=loops, kv_cache=cache)[:, -1:].argmax(-1)
    decode = model.decoder(cache, n_loops=loops)
    times = []
    for _ in range(tokens + 1):
        began = time.perf_counter()
        ids = decode(ids)[:, -1:].argmax(-1)
        ids.tolist()  # waits for a GPU
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times[1:])  # the first one warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--cached", type=int, default=256, help="tokens in the cache before the first one is timed")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--dim", type=int, default=256)
    options = parser.parse_args()

    torch.manual_seed(0)
    config = MythosConfig(
        vocab_size=1000, dim=options.dim, n_heads=4, n_experts=16, expert_dim=options.dim // 2, halting="off"
    )
    reference = OpenMythos(config).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    fast = openmythos_kernels.accelerate(copy.deepcopy(reference))
    prompt = torch.randint(1000, (1, options.cached), device=reference.embed.weight.device)
    print("loops  reference        ours   faster")
    for loops in options.loops:
        slow, quick = (milliseconds(model, prompt, loops, options.tokens) for model in (reference, fast))
        print(f"{loops:5} {slow:7.2f} ms {quick:8.2f} ms {slow / quick:7.2f}x")


if __name__ == "__main__":
    main()
