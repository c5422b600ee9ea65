"""Launches of a block at one token per row: seven, or eight with experts, whose sum the caller launches or has in a
kernel of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from openmythos_kernels.ops.layer import configs
from openmythos_kernels.ops.layer.kernels.attention import queries_kernel, values_kernel
from openmythos_kernels.ops.layer.kernels.experts import experts_down_kernel, experts_up_kernel
from openmythos_kernels.ops.layer.kernels.linear import added_linear_kernel, normed_linear_kernel
from openmythos_kernels.ops.layer.kernels.step import sum_kernel
from openmythos_kernels.ops.layer.weights import AttentionWeights, BlockWeights, Eps, RouterWeights
from openmythos_kernels.ops.mla.launch.latent import attend_parts
from openmythos_kernels.ops.moe.launch.weights import Experts


class Parts(NamedTuple):
    """A block's output, not yet summed.

    Attributes:
        x: (N, D). With a dense FFN it is the output, and the others are None.
        y: (N * K, D) float32, of each token's experts. topk_weights: (N, K).
        shared_y: (shared experts, N, D) float32.
        K, shared: experts per token, and shared experts.
    """

    x: Tensor
    y: Tensor | None = None
    topk_weights: Tensor | None = None
    shared_y: Tensor | None = None
    K: int = 0
    shared: int = 0

    def tensors(self) -> tuple:
        return self.x, self.y, self.topk_weights, self.shared_y

    def constants(self) -> dict:
        return dict(K=self.K, SHARED=self.shared, D=self.x.shape[1])

    def sum(self) -> Tensor:
        """(N, D)."""
        if self.y is None:
            return self.x
        (N, D), out = self.x.shape, torch.empty_like(self.x)
        grid = N, triton.cdiv(D, configs.SUM_BLOCK)
        sum_kernel[grid](*self.tensors(), out, N, **self.constants(), BLOCK=configs.SUM_BLOCK, **configs.overlap())
        return out


def block(
    x: Tensor,
    freqs: Tensor,
    lengths: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    weights: BlockWeights,
    expert_idx: Tensor,
) -> Parts:
    """One block, of checked arguments with at least one row. expert_idx: (N, K), is filled; (N, 0) with a dense FFN."""
    own, eps = AttentionWeights(*weights.attention), Eps(*weights.eps)
    x = _attention(x, freqs, lengths, latent_cache, rope_cache, weights, own, eps)
    if not weights.router:
        return _dense(x, weights, own, eps)
    return _experts(x, weights, own, eps, expert_idx)


def _attention(x, freqs, lengths, latent_cache, rope_cache, weights: BlockWeights, own: AttentionWeights, eps: Eps):
    """x + attention(norm(x)), (N, D)."""
    (N, _), (q_rank,), (r,), H = x.shape, own.q_norm.shape, own.kv_norm.shape, weights.n_heads
    nope, rope, v, size = weights.nope, weights.rope, weights.v, x.element_size()
    c_q, kv = x.new_empty(N, q_rank), x.new_empty(N, r + rope)
    _normed_linear(x, own.attn_norm, eps.attn_norm, own.q_down, own.kv_down, c_q, kv)

    q_latent, q_rope, seen = x.new_empty(N, H, r), x.new_empty(N, H, rope), torch.empty_like(lengths)
    tile = configs.queries(size, r, nope, rope)
    programs = triton.cdiv(N, tile["BM"]) * H * (triton.cdiv(r, tile["CHUNK"]) + 1) + N
    queries_kernel[(programs,)](
        c_q,
        kv,
        freqs,
        lengths,
        own.q_norm,
        own.kv_norm,
        own.q_up_nope,
        own.q_up_rope,
        own.kv_up,
        q_latent,
        q_rope,
        latent_cache,
        rope_cache,
        seen,
        N,
        latent_cache.shape[1],
        int(len(freqs) > 1),
        latent_cache.stride(0),
        rope_cache.stride(0),
        eps.latent_norms,
        H=H,
        Q=q_rank,
        R=r,
        NOPE=nope,
        ROPE=rope,
        V=v,
        **tile,
        **configs.overlap(),
    )
    scale = (nope + rope) ** -0.5
    means, lse = attend_parts(q_latent, q_rope, latent_cache, rope_cache, seen, None, scale, configs.splits)

    out = x.new_empty(N, H * v)
    tile = configs.values(r, v)
    values_kernel[(N * H, triton.cdiv(v, tile["BV"]))](
        means, lse, own.kv_up, out, N * H, len(means), H=H, R=r, NOPE=nope, V=v, **tile, **configs.overlap()
    )
    return _added_linear(out, own.wo, x)


def _normed_linear(x, gain, eps: float, first, second, first_out, second_out) -> None:
    """first_out, second_out = the two layers of norm(x); `second` may have no row."""
    (N, D), config = x.shape, configs.normed_linear(x.element_size())
    widths = len(first), len(second)
    columns = sum(triton.cdiv(width, config.n) for width in widths)
    normed_linear_kernel[(triton.cdiv(N, config.m), columns)](
        x, gain, first, second, first_out, second_out, N, eps, D, *widths, **config.constants(), **configs.overlap()
    )


def _added_linear(x, weight, y) -> Tensor:
    """y + weight x."""
    (N, D), z, config = y.shape, torch.empty_like(y), configs.linear(y.element_size())
    grid = triton.cdiv(N, config.m), triton.cdiv(D, config.n)
    added_linear_kernel[grid](x, weight, y, z, N, D, x.shape[1], **config.constants(), **configs.overlap())
    return z


def _dense(x, weights: BlockWeights, own: AttentionWeights, eps: Eps) -> Parts:
    """x + the dense FFN of norm(x)."""
    act = x.new_empty(1, len(x), len(weights.shared_gate[0]))
    _up(x, weights, own, eps, (None, None), (None, act, None, None))
    return Parts(_added_linear(act[0], weights.shared_down[0], x))


def _experts(x, weights: BlockWeights, own: AttentionWeights, eps: Eps, expert_idx: Tensor) -> Parts:
    router = RouterWeights(*weights.router)
    (N, D), K, size = x.shape, weights.topk, x.element_size()
    logits, topk_weights = x.new_empty(N, len(router.weight)), x.new_empty(N, K)
    _normed_linear(x, own.ffn_norm, eps.ffn_norm, router.weight, router.weight[:0], logits, logits)

    shared = len(weights.shared_gate)
    act = x.new_empty(N * K, len(weights.gate[0]))
    shared_act = x.new_empty(shared, N, len(weights.shared_gate[0]) if shared else 0)
    routed_down, shared_down = _up(
        x, weights, own, eps, (logits, router.bias), (act, shared_act, topk_weights, expert_idx)
    )
    y = x.new_empty((N * K, D), dtype=torch.float32)
    shared_y = x.new_empty((shared, N, D), dtype=torch.float32)
    config = configs.down(size)
    pairs = min(N, config.m) * K
    experts_down_kernel[(triton.cdiv(N, config.m) * (pairs + shared) * triton.cdiv(D, config.n),)](
        act,
        shared_act,
        expert_idx,
        *routed_down[:2],
        *shared_down[:2],
        y,
        shared_y,
        N,
        K,
        D,
        act.shape[1],
        shared,
        shared_act.shape[2],
        routed_down[2],
        shared_down[2],
        pairs,
        triton.next_power_of_2(K),
        **config.constants(),
        **configs.overlap(),
    )
    return Parts(x, y, topk_weights, shared_y, K, shared)


def _up(x, weights: BlockWeights, own: AttentionWeights, eps: Eps, routing: Sequence, results: Sequence):
    """Launches the experts' first layers. Returns the down-projections of the routed and of the shared experts: the
    first matrix, the offsets of all, and whether these are aligned.

    Args:
        routing: logits and bias. results: act, shared_act, topk_weights, expert_idx.
    """
    (N, D), E, K = x.shape, len(weights.gate), weights.topk if weights.router else 0
    routed = Experts("w", x, weights.gate, weights.up, weights.down)
    shared = Experts("shared", x, weights.shared_gate, weights.shared_up, weights.shared_down)
    none = None, None
    gates, ups, downs = zip(*((e.gate, e.up, e.down) if e.E else (none, none, none) for e in (routed, shared)))
    config = configs.up(x.element_size(), dense=not E)
    pairs = min(N, config.m) * K
    columns = pairs * triton.cdiv(routed.I, config.n) + shared.E * triton.cdiv(shared.I, config.n)
    rounded = routing[1] is not None and routing[1].dtype == x.dtype
    experts_up_kernel[(triton.cdiv(N, config.m) * columns,)](
        x,
        own.ffn_norm,
        *routing,
        *gates[0],
        *ups[0],
        *gates[1],
        *ups[1],
        *results,
        N,
        eps.ffn_norm,
        E,
        K,
        D,
        routed.I,
        shared.E,
        shared.I,
        routed.aligned,
        shared.aligned,
        rounded,
        pairs,
        triton.next_power_of_2(max(E, 1)),
        triton.next_power_of_2(max(K, 1)),
        **config.constants(),
        **configs.overlap(),
    )
    return (*downs[0], routed.aligned), (*downs[1], shared.aligned)
