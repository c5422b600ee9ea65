"""A training run from Python: text, model, depths and optimizer as one configuration, and the loss at every depth.

python examples/train_from_python.py [--steps 60] [--out runs/from_python]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from openmythos.training import DepthConfig, OptimizerConfig, TokenShards, TrainConfig, evaluate, load_run, run
from openmythos.training.config import DataConfig, LogConfig, ModelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dim", type=int, default=128, help="model width, a multiple of 64")
    parser.add_argument("--out", default="runs/from_python")
    options = parser.parse_args()

    shards = str(Path(options.out) / "shards")
    config = TrainConfig(
        out=options.out,
        steps=options.steps,
        batch=4,
        tokens=64,
        model=ModelConfig(
            vocab_size=257,  # bytes and an end of text
            dim=options.dim,
            n_heads=options.dim // 64,
            max_seq_len=64,
            n_experts=8,
            expert_dim=options.dim // 2,
            prelude_layers=1,
            coda_layers=1,
            injection="parcae",
            h0="zeros",
            halting="off",
        ),
        data=DataConfig(folder=shards, source="stdlib"),  # prepared if there are no shards yet
        depth=DepthConfig(sampling="poisson", mean=4, grad_loops="half"),
        optimizer=OptimizerConfig(lr=3e-3),
        log=LogConfig(progress=False, tensorboard=False),
    )
    result = run(config)  # the same call goes on where an earlier one was stopped
    print(f"{result.steps} steps, held-out loss {result.held_out:.3f}")

    model, _ = load_run(result.out)
    held_out = TokenShards(shards, "held_out", batch=4, tokens=64)
    for loops in (1, 2, 4, 8):
        print(f"{loops} loops: {evaluate(model, held_out, 2, n_loops=loops):.3f}")


if __name__ == "__main__":
    main()
