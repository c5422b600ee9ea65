"""Drop-in recurrent block: everything of a loop but its transformer block is one op."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import openmythos
from openmythos.attention import Mask
from openmythos.config import setting
from openmythos.injection import LTIInjection, ResidualInjection, loop_index_embedding
from openmythos.layers import RMSNorm
from openmythos.recurrence import ACTHalting, ACTState, Loops, LoRAAdapter, check_arguments, resolve_loops
from openmythos_kernels.nn.block import takes_causal
from openmythos_kernels.nn.causal import recognised
from openmythos_kernels.nn.guards import global_hooks, halt_obstacle, obstacle, own_methods, weight_obstacle
from openmythos_kernels.nn.moe import summing_in_place
from openmythos_kernels.nn.paths import early_exit
from openmythos_kernels.nn.paths.decode_loop import through_loops
from openmythos_kernels.ops.derivatives import transformed
from openmythos_kernels.ops.loop import (
    DTYPES,
    act_update,
    inject_norm,
    loop_down,
    loop_lora_step,
    loop_step,
    nothing_runs,
)
from openmythos_kernels.runtime.backends import Choice, choose, unavailable

# The submodules whose forward the op stands in for, and what they must be, exactly, for that.
_PARTS = {"injection": LTIInjection, "act": ACTHalting, "lora": LoRAAdapter, "norm": RMSNorm}
# Of the other injections nothing comes between the block and the halting, and what enters is theirs: the op halts.
_WHOLE = {"mythos": LTIInjection, "residual": ResidualInjection}


class RecurrentBlock(openmythos.RecurrentBlock):
    """`openmythos.RecurrentBlock`, same parameters and numbers, with the fused step.

    Attributes:
        trim: with halting="evolve" and without a cache, whether halted sequences and the positions behind the last
            running one stop being computed. Exact; the shapes inside the loop then depend on data.
        agree: in a group of several ranks, whether they leave the loop together once nothing runs on any of them (one
            all-reduce of a flag a loop). Otherwise every rank runs all loops.
    """

    trim: bool = True
    agree: bool = False

    def backend(self, states: tuple[Tensor, ...] = ()) -> Choice:
        """What a step of this block runs on, and why not on something faster.

        Args:
            states: h, e and the block's output; without them only the module itself is judged.
        """
        if reason := self._replaced():
            return Choice("reference", reason)
        choice = choose("loop_step", self.act.halt.weight.device.type)
        if not choice.fast:
            return choice
        reason = self._dtypes(states)
        if choice.backend == "triton" and self.act.halt.weight.dtype == torch.float64 and not reason:
            if not unavailable("loop_step", "cuda", "cuda"):
                return Choice("cuda", "the triton kernels take no float64")
            reason = "the triton kernels take no float64"
        return Choice("reference", reason) if reason else choice

    def _replaced(self) -> str:
        """Why the op must not stand in for this module's parts; empty when it may."""
        injection, halting = setting(self.cfg, "injection"), setting(self.cfg, "halting")
        whole = _WHOLE.get(injection)
        if not whole and halting != "evolve":
            return f'halting="{halting}" with injection="{injection}" has no fused step'
        if reason := global_hooks() or own_methods("this block", self, RecurrentBlock, called=True):
            return reason
        for name, kind in (_PARTS | {"injection": whole} if whole else {"act": ACTHalting}).items():
            part = self._modules.get(name)
            if part is not None and (reason := obstacle(name, part, kind)):  # None: no LoRA
                return reason
        if reason := halt_obstacle(self._modules["act"]):
            return reason
        return self._weights_replaced() if whole else ""

    def _weights_replaced(self) -> str:
        """Why parameters that no part of its own is called for must not be read; empty when they may."""
        injection, lora = self._modules["injection"], self._modules.get("lora")
        for name in ("log_A", "log_dt", "B"):
            if reason := weight_obstacle(name, injection._parameters.get(name), 1):
                return reason
        if lora is None:
            return ""
        return obstacle("lora's scale", lora._modules["scale"], nn.Embedding) or weight_obstacle(
            "lora's B", lora._parameters.get("B"), 2
        )

    def _dtypes(self, states: tuple[Tensor, ...]) -> str:
        """Why the op cannot compute with plain parts' weights and these states; empty when it can."""
        whole = setting(self.cfg, "injection") in _WHOLE
        halt = self.act.halt.weight
        dtype, device = halt.dtype, halt.device
        if dtype not in DTYPES:
            return f"weights of {dtype}"
        tensors = [*(self.weights() if whole else (halt, self.act.halt.bias)), *states]
        if any(x.dtype != dtype for x in tensors):
            return "weights and states have different dtypes"
        if any(x.device != device for x in tensors):
            return "weights and states are on different devices"
        return ""

    def forward(
        self,
        h: Tensor,
        e: Tensor,
        freqs_cis: Tensor,
        mask: Mask = None,
        n_loops: Loops = None,
        kv_cache: dict | None = None,
        return_ponder: bool = False,
        grad_loops: int | None = None,
        checkpoint_loops: bool = False,
    ):
        """As `openmythos.RecurrentBlock.forward`, without computing what has halted where that changes nothing."""
        arguments = (mask, n_loops, kv_cache, return_ponder, grad_loops, checkpoint_loops)
        counts = resolve_loops(n_loops, self.cfg, len(h))
        fixed = (
            torch.compiler.is_compiling() or torch.jit.is_tracing() or h.is_meta or detect_fake_mode((h,)) is not None
        )
        halting = setting(self.cfg, "halting")
        plain = isinstance(counts, int) and halting == "off"
        evolves = halting == "evolve" and h.numel() and not fixed
        if evolves and kv_cache is not None and isinstance(counts, int) and grad_loops is None and not checkpoint_loops:
            embeddings = [_embedding(t, h) for t in range(counts)]
            token = through_loops(self, h, e, freqs_cis, mask, embeddings, kv_cache)
            if token is not None:
                out = token.h_out.unsqueeze(1)
                return (out, token.ponder.unsqueeze(1)) if return_ponder else out
        if fixed:
            return super().forward(h, e, freqs_cis, *arguments)
        with summing_in_place(self.block):
            if plain or kv_cache is not None or halting == "freeze" or h.numel() == 0:
                return super().forward(h, e, freqs_cis, *arguments)
            check_arguments(self.cfg, *arguments[2:])
            if isinstance(mask, Tensor) and takes_causal(self.block):
                mask = recognised(mask, h.shape[1], h.shape[1])
            counts = [counts] * len(h) if isinstance(counts, int) else counts
            out, ponder = early_exit.run(
                self, h, e, freqs_cis, mask, counts, grad_loops, checkpoint_loops, self.trim, self.agree
            )
        out = self.injection.readout(out)
        return (out, ponder) if return_ponder else out

    def weights(self) -> tuple[Tensor, ...]:
        """The step's parameters, in its op's order."""
        injection, halt, weight = self.injection, self.act.halt, self.norm.weight
        lora_B = weight.new_empty(0, weight.shape[0]) if self.lora is None else self.lora.B
        return (lora_B, injection.log_A, injection.log_dt, injection.B, halt.weight, halt.bias, weight)

    def step(
        self, h: Tensor, e: Tensor, u: Tensor, f: Tensor, state: ACTState | None, t: int, last: bool
    ) -> tuple[Tensor, ACTState | None, Tensor | None]:
        """As `openmythos.RecurrentBlock.step`."""
        if not self.backend((h, e, f)).fast:
            return super().step(h, e, u, f, state, t, last)
        injection = setting(self.cfg, "injection")
        if injection not in _WHOLE:
            return self._halted(h, e, u, f, state, t, last)
        if injection == "residual":
            return self._fused(h, e, f - u, (self._low(h, f, t),), state, t, last)
        scale = self._scale(f, t) if choose("loop_lora_step", f.device.type).fast else None
        lora = (self._low(h, f, t),) if scale is None else (self.lora.down.weight, scale)
        return self._fused(h, e, f, lora, state, t, last)

    def steps_whole(self, states: tuple[Tensor, ...]) -> bool:
        """Whether everything of a step is the op's."""
        return setting(self.cfg, "injection") in _WHOLE and self.backend(states).fast

    def _scale(self, f: Tensor, t: int) -> Tensor | None:
        """The LoRA's scale in loop t, (rank,), if ops may stand in for the LoRA's down-projection."""
        lora = self.lora
        if (
            lora is None
            or obstacle("down", lora._modules["down"], nn.Linear)
            or torch.is_autocast_enabled(f.device.type)
        ):
            return None
        scale = lora._modules["scale"]
        if obstacle("scale", scale, nn.Embedding):
            return None
        return scale._parameters["weight"][min(t, scale.num_embeddings - 1)]

    def _low(self, h: Tensor, f: Tensor, t: int) -> Tensor:
        """The LoRA's coordinates of f, (B, T, rank) in h's dtype; rank 0 without LoRA."""
        if self.lora is None:
            return h.new_empty(*h.shape[:-1], 0)
        scale = self._scale(f, t) if choose("loop_down", f.device.type).fast else None
        if scale is None:
            return self.lora.hidden(f, t).to(h.dtype)  # under autocast in another dtype
        return loop_down(f, self.lora.down.weight) * scale

    def enter(self, h: Tensor, e: Tensor, t: int) -> Tensor:
        """As `openmythos.RecurrentBlock.enter`."""
        if setting(self.cfg, "injection") not in _WHOLE or not self.backend((h, e)).fast:
            return super().enter(h, e, t)
        return inject_norm(h, e, self.norm.weight, _embedding(t, h), self.norm.eps)

    def _halted(self, h, e, u, f, state, t, last):
        """`step` of an injection that adds nothing behind the block: halting by the op, the rest as in the
        reference."""
        new = self.injection.update(h, e, u, f if self.lora is None else f + self.lora(f, t)).to(h.dtype)
        spend_remainder = last and setting(self.cfg, "act_remainder") == "last"
        halt = self.act.halt
        state = act_update(new, *state, halt.weight, halt.bias, t, float(self.cfg.act_threshold), spend_remainder)
        return new, ACTState(*state), None if last else super().enter(new, e, t + 1)

    def _fused(
        self, h: Tensor, e: Tensor, f: Tensor, lora: tuple[Tensor, ...], state: ACTState | None, t: int, last: bool
    ) -> tuple[Tensor, ACTState | None, Tensor | None]:
        """`step` by the op; lora: the LoRA's down-projection and scale, or its coordinates of f, (B, T, rank)."""
        op = loop_step if len(lora) == 1 else loop_lora_step
        act, weights, freezes = state is not None, self.weights(), setting(self.cfg, "halting") == "freeze"
        if not act:  # a state in which nothing runs, and no gradient for what would halt
            state, weights = nothing_runs(h), (*weights[:4], weights[4].detach(), weights[5].detach(), weights[6])
        out = op(
            h,
            e,
            f,
            *lora,
            state.h_out,
            state.cumulative_p,
            state.running,
            state.ponder,
            *weights,
            _embedding(t + 1, h),
            loop=t,
            threshold=float(self.cfg.act_threshold),
            spend_remainder=last and setting(self.cfg, "act_remainder") == "last",
            enter=not (last or freezes),
            eps=self.norm.eps,
        )
        new, u = out.h, out.u
        if freezes:
            new = torch.where(state.running.unsqueeze(-1), new, h)
            u = None if last else self.enter(new, e, t + 1)
        after = ACTState(out.h_out, out.cumulative_p, out.running, out.ponder) if act else None
        return new, after, None if last else u


def _embedding(t: int, h: Tensor) -> Tensor:
    """The embedding of loop t for h; a dozen small ops, so kept where that is safe."""
    size = h.shape[-1] // 8
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or transformed():
        return loop_index_embedding(t, size, h.device, h.dtype)  # symbolic or fake: not to be kept
    key = (t, size, h.device, h.dtype)
    if key not in _embeddings:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be saved for a backward later
            made = loop_index_embedding(t, size, h.device, h.dtype)
        if h.is_cuda and torch.cuda.is_current_stream_capturing():
            return made  # filled when the graph is replayed, and its memory is the graph's
        _embeddings[key] = made
    return _embeddings[key]


# Never thrown away: CUDA graphs read them at every replay.
_embeddings: dict[tuple, Tensor] = {}
