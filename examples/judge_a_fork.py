"""Changes a model as forks do, and prints what `accelerate` swaps and why it leaves the rest alone.

python examples/judge_a_fork.py
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

import openmythos_kernels
from openmythos import MoEFFN, MythosConfig, OpenMythos


class ScaledExperts(MoEFFN):
    """A fork's layer: its mathematics is its own, so it keeps its code."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    config = MythosConfig(vocab_size=256, dim=64, n_heads=2, n_experts=4, expert_dim=32, max_loop_iters=2)
    model = OpenMythos(config).eval()
    model.recurrent.block.ffn.__class__ = ScaledExperts  # a subclass
    model.coda[0].attn.wo.register_forward_hook(lambda module, inputs, output: output)  # a hook
    model.prelude[0].ffn.forward = model.prelude[0].ffn.forward  # a method on the object

    ids = torch.randint(256, (1, 16))
    before = model(ids)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        openmythos_kernels.accelerate(model)
    print(*(warning.message for warning in caught), sep="\n", end="\n\n")
    print(openmythos_kernels.report(model), end="\n\n")

    after = model(ids)
    print(f"relative difference of the logits: {float((after - before).norm() / before.norm()):.1e}")
    openmythos_kernels.restore(model)
    print(f"restored: {'the same bits' if torch.equal(model(ids), before) else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
