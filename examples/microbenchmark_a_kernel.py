"""Times the expert kernel against the reference's layer for several numbers of tokens, in interleaved rounds.

python examples/microbenchmark_a_kernel.py [--tokens 1 16 256] [--rounds 7] [--dim 512] [--experts 32]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import openmythos_kernels
from openmythos import MoEFFN, MythosConfig


def seconds(layer: torch.nn.Module, x: torch.Tensor) -> float:
    """Seconds of one forward; on a GPU the clock waits for the device."""
    began = time.perf_counter()
    layer(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--experts", type=int, default=32)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = MythosConfig(dim=options.dim, n_experts=options.experts, expert_dim=options.dim // 2)
    reference, fast = MoEFFN(config).to(device), MoEFFN(config).to(device)
    fast.load_state_dict(reference.state_dict())
    openmythos_kernels.accelerate(fast)
    print(openmythos_kernels.report(fast), end="\n\n")

    print("tokens   reference        ours   faster    relative difference")
    for tokens in options.tokens:
        x = torch.randn(1, tokens, options.dim, device=device)
        expected = reference(x)
        apart = float((fast(x) - expected).norm() / expected.norm())  # also the warm-up
        rounds = [(seconds(reference, x), seconds(fast, x)) for _ in range(options.rounds)]
        slow, quick = (statistics.median(column) for column in zip(*rounds))
        ratio = statistics.median(a / b for a, b in rounds)
        print(f"{tokens:6} {slow * 1e3:8.3f} ms {quick * 1e3:8.3f} ms {ratio:7.2f}x    {apart:.1e}")


if __name__ == "__main__":
    main()
