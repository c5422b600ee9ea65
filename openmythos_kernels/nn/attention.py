"""Drop-in latent attention: one op for a decode step, one for the attention of prompts and training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import openmythos
from openmythos.attention import CausalMask, Mask
from openmythos.cache import LayerCache, layer_cache
from openmythos.dropout import drops
from openmythos.layers import RMSNorm
from openmythos_kernels.nn.causal import recognised
from openmythos_kernels.nn.guards import compute_dtype, global_hooks, obstacle, own_methods, packs_saved
from openmythos_kernels.nn.paths.cuda_graph import lengths_on_device, to_device
from openmythos_kernels.nn.paths.mla_recompute import FromLatents
from openmythos_kernels.nn.paths.sdpa import FusedAttend
from openmythos_kernels.ops import mla
from openmythos_kernels.ops.derivatives import transformed
from openmythos_kernels.ops.flat import any_requires_grad
from openmythos_kernels.runtime.backends import Choice, choose

# In the order in which decode ops take their weights.
_PARTS = {
    "q_down": nn.Linear,
    "q_norm": RMSNorm,
    "q_up_nope": nn.Linear,
    "q_up_rope": nn.Linear,
    "kv_down": nn.Linear,
    "kv_norm": RMSNorm,
    "kv_up": nn.Linear,
    "wo": nn.Linear,
}
# Bytes of a call's queries, keys, values and output up to which keeping them is worth more than the memory.
PLENTIFUL = 8 << 20
# Of `per_head`.
_NORMS, _UP = ("q_norm", "kv_norm"), ("q_up_nope", "q_up_rope", "kv_up")


class MLAttention(openmythos.MLAttention):
    """`openmythos.MLAttention`, same parameters and numbers, faster forward.

    A cached single token per row without gradients runs as one op (`openmythos_kernels.ops.mla`).
    Everything else keeps the reference's projections. Where the mask is causal or absent and nothing is dropped, many
    queries go through `mla.attention`, which takes keys as the projections leave them (on a GPU in 16 bits), and what
    is left through PyTorch's fused attention.

    Attributes:
        recompute: whether training keeps only the latents, q_lora_rank + kv_lora_rank + rope numbers a token, of what
            goes through `mla.attention`, and makes queries, keys, values and output again in the backward pass, in
            calls where these take PLENTIFUL bytes or more. Switch it off where memory is plentiful: training is then a
            little faster.
    """

    recompute: bool = True

    def backend(self) -> Choice:
        """What a decode step runs on, as far as this module by itself decides it, and why."""
        if reason := self._replaced():
            return Choice("reference", reason)
        choice = choose("mla_decode", self._modules["kv_norm"].weight.device.type)
        reason = self._dtypes() if choice.fast else ""
        return Choice("reference", reason) if reason else choice

    def _replaced(self) -> str:
        """What the op would bypass by not calling the submodules; empty if nothing."""
        parts = self._modules
        reason = global_hooks() or own_methods("this layer", self, MLAttention, called=True)
        if reason := reason or obstacle("attn_drop", parts["attn_drop"], nn.Dropout):
            return reason
        for name, kind in _PARTS.items():
            if reason := obstacle(name, parts[name], kind):
                return reason
        return ""

    def _dtypes(self) -> str:
        """What the op cannot compute of plain parts; empty if nothing."""
        parts = self._modules
        dtype = parts["kv_norm"].weight.dtype
        if dtype not in mla.DTYPES:
            return f"weights of {dtype}"
        if dtype == torch.float64 and parts["kv_norm"].weight.device.type != "cpu":
            return "weights of float64 on a GPU"
        for name in _PARTS:
            if parts[name]._parameters["weight"].dtype != dtype:
                return f"{name}'s weight is of another dtype than the others"
        if parts["q_norm"].eps != parts["kv_norm"].eps:
            return "q_norm and kv_norm have different eps"
        return ""

    def _decodes(self, x: Tensor, mask: Mask, entry: LayerCache | None) -> bool:
        """Whether this call is a decode step that the op computes as the reference would."""
        if x.shape[1] != 1 or entry is None or torch.is_grad_enabled() or transformed():
            return False
        if torch.is_autocast_enabled(x.device.type) or not self.backend().fast:
            return False
        if x.dtype != self._modules["kv_norm"].weight.dtype or drops(self._modules["attn_drop"]):
            return False
        return holds(entry, mask, len(x))

    def forward(
        self, x: Tensor, freqs_cis: Tensor, mask: Mask = None, kv_cache: dict | None = None, cache_key: str = "default"
    ) -> Tensor:
        """As `openmythos.MLAttention.forward`."""
        entry = layer_cache(kv_cache, cache_key, self.taken_over)
        if isinstance(mask, Tensor) and (held := _held(entry)) is not None:
            mask = recognised(mask, x.shape[1], held + x.shape[1])
        narrow = freqs_cis.dtype == torch.complex64  # what the ops take
        if narrow and self._decodes(x, mask, entry):
            return self._decode(x, freqs_cis, entry)
        if narrow and self._per_head(x, mask):
            return self._prompt(x, freqs_cis, mask, entry)
        return super().forward(x, freqs_cis, mask, kv_cache, cache_key)

    def _per_head(self, x: Tensor, mask: Mask) -> bool:
        """Whether `mla.attention` computes this call's attention as the reference would."""
        choice = choose("mla_attention", x.device.type)
        if x.shape[1] == 1 or isinstance(mask, Tensor) or not choice.fast:
            return False
        if self._skips_dropout() or own_methods("this layer", self, MLAttention, called=True):
            return False
        dtype = compute_dtype(x)
        if not torch.is_autocast_enabled(x.device.type):
            up = self._modules["kv_up"]
            if not obstacle("kv_up", up, nn.Linear) and up.weight.dtype != dtype:
                return False
        for name in _NORMS:
            norm = self._modules[name]
            if obstacle(name, norm, RMSNorm) or norm.weight.dtype not in (dtype, torch.float32):
                return False
        half = dtype in (torch.bfloat16, torch.float16)
        if choice.backend == "triton":
            return half  # a GPU has no matrix instruction of full float32 precision
        # In low precision PyTorch's kernel multiplies by the processor's 16-bit instructions, but is slow backwards.
        return dtype == torch.float32 or (half and torch.is_grad_enabled())

    def _skips_dropout(self) -> bool:
        """Whether not calling `attn_drop` would be noticed."""
        drop = self.attn_drop
        return bool(global_hooks() or obstacle("attn_drop", drop, nn.Dropout) or drops(drop))

    def _prompt(self, x: Tensor, freqs_cis: Tensor, mask: CausalMask | None, entry: LayerCache | None) -> Tensor:
        phasors = torch.view_as_real(freqs_cis)
        phasors = phasors if phasors.dim() == 4 else phasors.unsqueeze(0)
        start = mask if mask is None else mask.start
        if start is not None and not isinstance(start, int):
            start = torch.as_tensor(start, dtype=torch.int64, device=x.device)
        c_q, c_kv = self.project("q_down", x), self.project("kv_down", x)
        if entry is None and self._forgets(x):
            return FromLatents.apply(self, c_q, c_kv, phasors, start, *self.per_head_weights(), self.wo.weight)
        inputs = self.per_head(c_q, c_kv, phasors, entry)
        return self.project("wo", mla.attention(*inputs, start)[0].flatten(2))

    def project(self, name: str, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """What the projection of this name makes of x; with `weight`, what a plain one of this weight would."""
        part = self._modules[name]
        if weight is None:
            if global_hooks() or obstacle(name, part, nn.Linear):
                return part(x)
            weight = part.weight
        fast = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        fast = fast and choose("mla_linear", x.device.type).fast
        return mla.linear(x, weight) if fast else F.linear(x, weight)

    def _forgets(self, x: Tensor) -> bool:
        """Whether this forward keeps the latents alone. Compilers and checkpointing decide by themselves what to keep,
        and hooks would see the parts run twice."""
        if not (self.recompute and torch.is_grad_enabled()) or torch.compiler.is_compiling() or packs_saved():
            return False
        if global_hooks() or transformed():
            return False
        numbers = self.n_heads * (2 * self.qk_nope_dim + self.qk_rope_dim + 2 * self.v_dim)
        if x.shape[0] * x.shape[1] * numbers * compute_dtype(x).itemsize < PLENTIFUL:
            return False
        return not any(obstacle(name, self._modules[name], nn.Linear) for name in (*_UP, "wo"))

    def per_head_weights(self) -> list[Tensor]:
        """The weights of `per_head`."""
        return [self._modules[name].weight for name in (*_NORMS, *_UP)]

    def per_head(
        self,
        c_q: Tensor,
        c_kv: Tensor,
        phasors: Tensor,
        entry: LayerCache | None = None,
        weights: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `mla.attention` takes of what `q_down` and `kv_down` made; `weights`: as of `per_head_weights`, where
        every projection is plain."""
        q_norm, kv_norm, *up = weights or (self.q_norm.weight, self.kv_norm.weight, None, None, None)
        c_q = mla.norm_rope(c_q, phasors, q_norm, self.q_norm.eps)[0]
        q_nope = self.project("q_up_nope", c_q, up[0]).unflatten(-1, (self.n_heads, self.qk_nope_dim))
        q_rope = mla.norm_rope(self.project("q_up_rope", c_q, up[1]), phasors, c_q.new_empty(0), 0.0)[1]
        latent, k_rope = mla.norm_rope(c_kv, phasors, kv_norm, self.kv_norm.eps)
        if entry is not None:
            latent, k_rope = entry.append(latent=latent, k_rope=k_rope)
        kv = self.project("kv_up", latent, up[2]).unflatten(-1, (self.n_heads, self.qk_nope_dim + self.v_dim))
        return q_nope, q_rope.unflatten(-1, (self.n_heads, self.qk_rope_dim)), kv, k_rope

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """As `openmythos.MLAttention.attend`."""
        if self._skips_dropout() or isinstance(mask, Tensor) or not q.dtype == k.dtype == v.dtype:
            return super().attend(q, k, v, mask)
        if torch.compiler.is_compiling():
            return _fused_attend(q, k, v, mask)
        if transformed():  # which PyTorch's kernels are not made for
            return super().attend(q, k, v, mask)
        graded = torch.is_grad_enabled() and any_requires_grad((q, k, v)) and not packs_saved()
        return FusedAttend.apply(_fused_attend, q, k, v, mask) if graded else _fused_attend(q, k, v, mask)

    def _decode(self, x: Tensor, freqs_cis: Tensor, entry: LayerCache) -> Tensor:
        latent, k_rope = self.room(entry, x)
        lengths = _on_device(entry.lengths, x.device)
        weights, sizes = self.token_weights()
        eps = self._modules["q_norm"].eps
        y = mla.decode(x.squeeze(1), phasors_of(freqs_cis), latent, k_rope, lengths, **weights, **sizes, eps=eps)
        entry.lengths = [n + 1 for n in entry.lengths]
        return y.unsqueeze(1)

    def token_weights(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What a decode op takes of this layer: weights, and numbers of heads and channels."""
        parts = self._modules
        weights = {name: parts[name]._parameters["weight"] for name in _PARTS}
        return weights, dict(n_heads=self.n_heads, nope=self.qk_nope_dim, rope=self.qk_rope_dim, v=self.v_dim)

    def room(self, entry: LayerCache, x: Tensor) -> tuple[Tensor, Tensor]:
        """The cache's latents and rotary keys, with room for one more token per row of x (B, ...)."""
        tensors = entry.tensors
        held, rope = tensors.get("latent"), tensors.get("k_rope")
        new = held is None or held.shape[0] != len(x) or held.dtype != x.dtype or max(entry.lengths) >= held.shape[1]
        if new or not (held.stride(0) and rope.stride(0)):  # rows that share memory
            widths = {"latent": self.kv_lora_rank, "k_rope": self.qk_rope_dim}
            entry.reserve(1, **{name: x.new_empty(len(x), 1, width) for name, width in widths.items()})
            held, rope = tensors["latent"], tensors["k_rope"]
        return held, rope


def _held(entry: LayerCache | None) -> int | None:
    """Tokens that every row of a cache holds; None where rows differ or nobody can say."""
    if entry is None:
        return 0
    return max(entry.lengths, default=0) if type(entry) is LayerCache and entry.uniform else None


def holds(entry: LayerCache, mask: Mask, rows: int) -> bool:
    """Whether a token per row that may see what `mask` says sees all that its row of a cache holds, and nothing
    else."""
    if type(entry) is not LayerCache:
        return False
    if mask is None:
        return entry.uniform  # else the reference shows a short row what lies behind its end
    if type(mask) is not CausalMask:
        return False
    held, start = entry.lengths or [0] * rows, mask.start
    return all(n == start for n in held) if isinstance(start, int) else list(start) == held


def phasors_of(freqs_cis: Tensor) -> Tensor:
    """(cos, sin) of one token per row, (B or 1, rope / 2, 2)."""
    phasors = torch.view_as_real(freqs_cis)
    return phasors if phasors.dim() == 3 else phasors.squeeze(1)


def _on_device(lengths: list[int], device: torch.device) -> Tensor:
    """(B,) int64, without waiting for the device."""
    if not torch.compiler.is_compiling() and (given := lengths_on_device.get()) is not None:
        given.asked += 1
        return given.tensor
    return to_device(lengths, device)


def _fused_attend(q: Tensor, k: Tensor, v: Tensor, mask: CausalMask | None) -> Tensor:
    """`openmythos.attention.attend` without dropout, on PyTorch's fused attention: no (T, S) scores in memory."""
    dtype, width, v_dim = q.dtype, q.shape[-1], v.shape[-1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    hidden, square = None, False
    if mask is not None and not mask.sees_all:
        square = mask.start == 0 and q.shape[2] == k.shape[2]
        hidden = None if square else mask.additive(k.shape[2], q)
    on_cpu = q.device.type == "cpu"
    if on_cpu:
        # The fused CPU kernel wants one width for queries, keys and values; without it PyTorch takes an unfused path.
        q, k, v = (F.pad(x, (0, max(width, v_dim) - x.shape[-1])) for x in (q, k, v))
    if on_cpu and torch.is_grad_enabled() and dtype in (torch.bfloat16, torch.float16):
        # Its backward is several times slower in low precision than in float32, casts included.
        q, k, v = q.float(), k.float(), v.float()
        hidden = None if hidden is None else hidden.float()
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(q, k, v, hidden, is_causal=square, scale=width**-0.5)
    return out[..., :v_dim].transpose(1, 2).flatten(2).to(dtype)
