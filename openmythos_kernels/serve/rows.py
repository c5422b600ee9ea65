"""The state of tokens inside the loop: one row a token."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from openmythos.layers import at_least_fp32
from openmythos_kernels.serve.weights import Weights


@dataclass
class Rows:
    """N tokens, each in a loop of its own; `loop_rows` has the same names.

    Attributes:
        h, e, h_out: (N, D): the state, what every loop injects, and the sum of the states.
        cumulative_p, ponder, running: (N,), ACT's state.
        loop, limit: (N,) int64: the next loop, and the loops allowed. A row with limit 0 is free.
        angles: (N, rope / 2, 2) float32. sequence, position: (N,) int64.
    """

    h: Tensor
    e: Tensor
    h_out: Tensor
    cumulative_p: Tensor
    ponder: Tensor
    running: Tensor
    loop: Tensor
    limit: Tensor
    angles: Tensor
    sequence: Tensor
    position: Tensor

    @staticmethod
    def free(count: int, weights: Weights) -> Rows:
        """`count` free rows."""
        h = torch.zeros(count, weights.cfg.dim, dtype=weights.dtype, device=weights.device)
        p = at_least_fp32(h.new_zeros(count))
        number = torch.zeros(count, dtype=torch.int64, device=h.device)
        return Rows(
            h=h,
            e=h.clone(),
            h_out=h.clone(),
            cumulative_p=p,
            ponder=p.clone(),
            running=torch.zeros_like(p, dtype=torch.bool),
            loop=number,
            limit=number.clone(),
            angles=weights.angles.new_zeros(count, *weights.angles.shape[1:]),
            sequence=number.clone(),
            position=number.clone(),
        )

    def __getitem__(self, part: slice) -> Rows:
        """Some rows, in place."""
        return Rows(*(getattr(self, field.name)[part] for field in fields(self)))

    def start(self, at: Tensor, e: Tensor, h: Tensor, limit: Tensor, angles: Tensor, tokens: Tokens) -> None:
        """Puts tokens that have left the prelude into rows `at`, before their first loop."""
        for held in (self.h_out, self.cumulative_p, self.ponder, self.loop):
            held.index_fill_(0, at, 0)
        self.running.index_fill_(0, at, True)
        new = dict(h=h, e=e, limit=limit, angles=angles, sequence=tokens.sequence, position=tokens.position)
        for name, value in new.items():
            getattr(self, name).index_copy_(0, at, value)

    def tokens(self, at: Tensor) -> Tokens:
        """Which tokens are in rows `at`."""
        return Tokens(self.sequence[at], self.position[at])


@dataclass
class Tokens:
    """Tokens by sequence and position, (N,) int64 each."""

    sequence: Tensor
    position: Tensor
