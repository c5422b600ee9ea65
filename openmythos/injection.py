"""Input injection: how a loop's input enters the recurrent state. The variants share one interface.

    e  = prepare(e, norm)          once, before the first loop
    u  = enter(h, e, t, norm)      what the block reads in loop t
    h' = update(h, e, u, block_out)
    h  = readout(h)                once, after the last loop

`norm` is the recurrent block's RMSNorm; in the parameter tree it stands beside the injection. All tensors are
(B, T, dim).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from openmythos.config import MythosConfig
from openmythos.layers import at_least_fp32

# Bounds of log(dt * |A|). Below the lower one exp(-exp(.)) rounds to exactly 1 in float32: a state that never decays,
# which the parametrization exists to rule out.
LOG_RATE_MIN, LOG_RATE_MAX = -16.6, 20.0


Norm = Callable[[Tensor], Tensor]  # the recurrent block's norm, or what computes it


def loop_index_embedding(
    loop_t: int, loop_dim: int, device=None, dtype=torch.float32, theta: float = 10000.0
) -> Tensor:
    """Sinusoidal embedding of the loop index, (loop_dim,): `[sin(t w), cos(t w)]`, `w_k = theta^(-2k / loop_dim)`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frequency = 1.0 / theta ** (torch.arange(0, loop_dim, 2, device=device, dtype=wide) / loop_dim)
    angle = loop_t * frequency
    return torch.cat((angle.sin(), angle.cos()))[:loop_dim].to(dtype)  # odd loop_dim: the last cosine is dropped


class Injection(nn.Module):
    """Base class of the variants, with the steps that most of them leave trivial."""

    uses_norm = False  # whether the recurrent block has an RMSNorm for it

    def prepare(self, e: Tensor, norm: Norm) -> Tensor:
        return e

    def enter(self, h: Tensor, e: Tensor, t: int, norm: nn.Module) -> Tensor:
        raise NotImplementedError

    def update(self, h: Tensor, e: Tensor, u: Tensor, block_out: Tensor) -> Tensor:
        return block_out

    def readout(self, h: Tensor) -> Tensor:
        return h

    def spectral_radius(self) -> float:
        """Largest modulus of the eigenvalues of the linear part h -> h', without the block."""
        raise NotImplementedError


class LTIInjection(Injection):
    """`h' = A*h + B*e + block_out`, with a diagonal A that is stable by construction (after Parcae, arXiv 2604.12946).

    `A = exp(-exp(log_dt + log_A))` lies in [0, 1) for any parameter values. A and the sum are computed in float32:
    bfloat16 would round a slow decay to none.
    """

    uses_norm = True

    def __init__(self, dim: int):
        super().__init__()
        self.log_A = nn.Parameter(torch.zeros(dim))
        self.log_dt = nn.Parameter(torch.zeros(1))
        self.B = nn.Parameter(torch.full((dim,), 0.1))

    def get_A(self) -> Tensor:
        """The diagonal of the discretized state matrix, (dim,), in float32 (float64 for float64 parameters)."""
        log_rate = at_least_fp32(self.log_dt) + at_least_fp32(self.log_A)
        return torch.exp(-torch.exp(log_rate.clamp(LOG_RATE_MIN, LOG_RATE_MAX)))

    def enter(self, h: Tensor, e: Tensor, t: int, norm: nn.Module) -> Tensor:
        emb = loop_index_embedding(t, h.shape[-1] // 8, h.device, h.dtype)
        return norm(h + F.pad(emb, (0, h.shape[-1] - emb.shape[0])) + e)

    def update(self, h: Tensor, e: Tensor, u: Tensor, block_out: Tensor) -> Tensor:
        return self(h, e, block_out)

    def forward(self, h: Tensor, e: Tensor, transformer_out: Tensor) -> Tensor:
        return (self.get_A() * h + self.B * e + transformer_out).to(h.dtype)

    def spectral_radius(self) -> float:
        return self.get_A().max().item()


class ResidualInjection(LTIInjection):
    """As `LTIInjection`, with only what the block added to its input: `h' = A*h + B*e + (block_out - u)`."""

    def update(self, h: Tensor, e: Tensor, u: Tensor, block_out: Tensor) -> Tensor:
        return self(h, e, block_out - u)


class ParcaeInjection(Injection):
    """The update of Parcae (arXiv 2604.12946): `u = a*h + dt * (e @ B^T)`, `h' = block(u)`, read-out `h @ C^T`.

    e is RMS-normalized and multiplied with B once, before the loops. Per channel, `dt = softplus(dt_bias)` and
    `a = exp(-dt * exp(A_log))`.
    """

    uses_norm = True
    INITIAL_DECAY = 0.447

    def __init__(self, dim: int):
        super().__init__()
        dt = -math.log(self.INITIAL_DECAY)
        self.A_log = nn.Parameter(torch.zeros(dim))
        self.dt_bias = nn.Parameter(torch.full((dim,), math.log(math.expm1(dt))))
        self.B = nn.Parameter(torch.eye(dim))
        self.C = nn.Parameter(torch.eye(dim))

    def rates(self) -> tuple[Tensor, Tensor]:
        """(log(dt * |A|), dt), each (dim,) in float32 (float64 for float64 parameters)."""
        dt = F.softplus(at_least_fp32(self.dt_bias))
        return torch.log(dt) + at_least_fp32(self.A_log), dt

    def decay(self) -> tuple[Tensor, Tensor]:
        """(a, dt), each (dim,), in the dtype of `rates`; a in [0, 1)."""
        log_rate, dt = self.rates()
        return torch.exp(-torch.exp(log_rate.clamp(LOG_RATE_MIN, LOG_RATE_MAX))), dt

    def prepare(self, e: Tensor, norm: Norm) -> Tensor:
        return F.linear(norm(e), self.B)

    def enter(self, h: Tensor, e: Tensor, t: int, norm: nn.Module) -> Tensor:
        a, dt = self.decay()
        return (a * h + dt * e).to(h.dtype)

    def readout(self, h: Tensor) -> Tensor:
        return F.linear(h, self.C).to(h.dtype)

    def spectral_radius(self) -> float:
        return self.decay()[0].max().item()


class ConcatInjection(Injection):
    """The adapter of Huginn (arXiv 2502.05171): `u = W [h; e]`, `h' = block(u)`."""

    def __init__(self, dim: int):
        super().__init__()
        self.W = nn.Linear(2 * dim, dim, bias=False)

    def enter(self, h: Tensor, e: Tensor, t: int, norm: nn.Module) -> Tensor:
        return self.W(torch.cat((h, e), dim=-1)).to(h.dtype)

    def spectral_radius(self) -> float:
        on_h = at_least_fp32(self.W.weight.detach())[:, : self.W.out_features]
        return torch.linalg.eigvals(on_h).abs().max().item()


class AddInjection(Injection):
    """`u = h + e`, `h' = block(u)`: the unstable baseline, of spectral radius 1."""

    def __init__(self, dim: int):
        super().__init__()

    def enter(self, h: Tensor, e: Tensor, t: int, norm: nn.Module) -> Tensor:
        return h + e

    def spectral_radius(self) -> float:
        return 1.0


_VARIANTS = {
    "mythos": LTIInjection,
    "residual": ResidualInjection,
    "parcae": ParcaeInjection,
    "concat": ConcatInjection,
    "add": AddInjection,
}


def make_injection(cfg: MythosConfig) -> Injection:
    """The variant named by cfg.injection."""
    return _VARIANTS[cfg.injection](cfg.dim)
