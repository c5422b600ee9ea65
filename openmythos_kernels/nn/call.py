"""The facts of one call of a module. Each is asked once, here, and nowhere else in `nn/`.

What a *module* is (its parts, hooks, weights) is the subject of `guards`; what a *call* is (gradients, autocast, who
traces it, its mask and cache) is the subject of this file. A path reads both and decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmythos import compat
from openmythos.attention import CausalMask, Mask
from openmythos.cache import LayerCache, layer_cache
from openmythos.config import setting
from openmythos.exits import ACT, ExitRule, exit_rule
from openmythos.recurrence import resolve_loops
from openmythos_kernels.nn.causal import recognised


def dtype_of(x: Tensor) -> torch.dtype:
    """What a linear layer computes x in: autocast's dtype if it is on, else x's."""
    if x.dtype != torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class Call:
    """A call of `module` with input x.

    Attributes:
        device: type of x's device.
        grad: whether autograd records.
        autocast: whether autocast is on for the device.
        dtype: what a linear layer computes in: autocast's dtype if it is on, else x's.
        compiling: whether torch.compile traces this call. Its graph may not depend on data.
        transformed: whether a function transform, a forward-mode level or torch.jit's tracer follows the call.
    """

    def __init__(self, module: Any, x: Tensor):
        self.module, self.x, self.device = module, x, x.device.type
        self.grad = torch.is_grad_enabled()
        self.compiling = torch.compiler.is_compiling()
        self.autocast = self.device != "meta" and torch.is_autocast_enabled(self.device)
        self.transformed = not self.compiling and compat.transformed()
        self.dtype = dtype_of(x) if self.autocast else x.dtype

    def by_reference(self):
        """What the module of `openmythos` makes of this call."""
        return self.module.reference(self)

    @property
    def packs_saved(self) -> bool:
        """Whether hooks take what is saved for the backward, as activation checkpointing does: it runs the forward
        again, which must save the same."""
        return compat.saved_tensors_are_hooked()

    @property
    def runs_now(self) -> bool:
        """Whether Python runs this call on real numbers: nothing compiles, traces, transforms or fakes it."""
        return not (self.compiling or self.transformed or compat.is_in_torch_dispatch_mode())

    @property
    def inference(self) -> bool:
        """Whether an op without derivatives may compute this call in x's own dtype, right now."""
        return not (self.grad or self.autocast) and self.runs_now

    @property
    def free_shapes(self) -> bool:
        """Whether shapes and the number of loops may depend on data: not in a compiled, traced or captured graph, and
        not on fakes."""
        x = self.x
        if self.compiling or torch.jit.is_tracing() or x.is_meta or compat.fake_mode_active(x):
            return False
        return not compat.capturing(x.device)


class ModelCall(Call):
    """A call of a language model.

    Args:
        input_ids: (B, T).
        n_loops, kv_cache, start_pos, exit: as for `openmythos.OpenMythos.forward`, whose other arguments are `others`.

    Attributes:
        others: whether any of the other arguments is set.
        counts, halting, rule: as of a `LoopCall`.
        judged, entries: what `decode_token` found of the model and of its cache.
    """

    judged: Any
    entries: Any

    def __init__(self, module, input_ids: Tensor, n_loops, kv_cache, start_pos, exit, **others):
        super().__init__(module, input_ids)
        self.n_loops, self.kv_cache, self.start_pos = n_loops, kv_cache, start_pos
        self.counts: Any = resolve_loops(n_loops, module.cfg, len(input_ids))
        self.exit, self.rule, self.halting = _halting(module.cfg, exit)
        self._others = others

    @property
    def others(self) -> bool:
        return any(value is not None and value is not False for value in self._others.values())

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the model's forward."""
        named = dict(n_loops=self.n_loops, kv_cache=self.kv_cache, start_pos=self.start_pos, exit=self.exit)
        return {"input_ids": self.x, **named, **self._others}


class LayerCall(Call):
    """A call of an attention layer or of a block.

    Args:
        x: (B, T, dim).
        freqs_cis, mask, kv_cache, cache_key: as for `openmythos.MLAttention.forward`.
        convert: turns another package's cache entry into ours; None leaves it.
    """

    def __init__(self, module, x: Tensor, freqs_cis: Tensor, mask: Mask, kv_cache, cache_key: str, convert=None):
        super().__init__(module, x)
        self.freqs_cis, self.kv_cache, self.cache_key = freqs_cis, kv_cache, cache_key
        self.mask: Any = mask  # a `PackedKeys` in packed rows
        self._causal, self._convert = mask, convert

    @property
    def entry(self) -> Any:
        """The layer's cache entry, made at its first use; None without a cache."""
        return layer_cache(self.kv_cache, self.cache_key, self._convert)

    @property
    def causal(self) -> Mask:
        """The mask, as a CausalMask also where one came as a tensor."""
        if isinstance(self._causal, Tensor) and (held := _held(self.entry)) is not None:
            self._causal = recognised(self._causal, self.x.shape[1], held + self.x.shape[1])
        return self._causal

    @property
    def a_token_per_row(self) -> bool:
        """Whether each row decodes one token that sees all that its row of the cache holds, and nothing else."""
        if self.x.shape[1] != 1 or self.kv_cache is None:
            return False
        return holds(self.entry, self.causal, len(self.x))

    @property
    def narrow(self) -> bool:
        """Whether rotary angles are complex64, which is what ops take."""
        return self.freqs_cis.dtype == torch.complex64


class LoopCall(Call):
    """A call of a recurrent block.

    Args:
        h, e: (B, T, dim).
        freqs_cis, mask, n_loops, kv_cache, return_ponder, grad_loops, checkpoint_loops, exit, predict,
            return_trajectory: as for `openmythos.RecurrentBlock.forward`.

    Attributes:
        arguments: those of the module's forward.
        counts: loops, or a list of one number per sequence.
        halting: the configuration's; "freeze" with an exit, "off" with return_trajectory.
        rule: the exit rule that decides in ACT's place, or None.
    """

    counts: Any

    def __init__(
        self,
        module,
        h,
        e,
        freqs_cis,
        mask,
        n_loops,
        kv_cache,
        return_ponder,
        grad_loops,
        checkpoint_loops,
        exit,
        predict,
        return_trajectory,
    ):
        super().__init__(module, h)
        self.h, self.e, self.freqs_cis, self.mask, self.kv_cache = h, e, freqs_cis, mask, kv_cache
        self.return_ponder, self.grad_loops, self.checkpoint_loops = return_ponder, grad_loops, checkpoint_loops
        self.predict, self.return_trajectory = predict, return_trajectory
        self.exit, self.rule, self.halting = _halting(module.cfg, exit)
        self.arguments = (
            *(h, e, freqs_cis, mask, n_loops, kv_cache, return_ponder, grad_loops, checkpoint_loops),
            *(self.exit, predict, return_trajectory),
        )
        self.counts = resolve_loops(n_loops, module.cfg, len(h))
        if return_trajectory:
            self.halting = "off"

    @property
    def narrow(self) -> bool:
        """Whether rotary angles are complex64, which is what ops take."""
        return self.freqs_cis.dtype == torch.complex64


class StepCall(Call):
    """A call of `RecurrentBlock.step`; f is the block's output in loop t."""

    u: Any
    f: Any

    def __init__(self, module, h: Tensor, e: Tensor, u: Tensor | None, f: Tensor | None, state, t: int, last: bool):
        super().__init__(module, h)
        self.h, self.e, self.u, self.f, self.state, self.t, self.last = h, e, u, f, state, t, last

    def by_reference(self):
        """What `openmythos.RecurrentBlock` makes of this step."""
        return self.module.reference_step(self)

    @property
    def states(self) -> tuple[Tensor, ...]:
        """The states that an op reads."""
        return (self.h, self.e) if self.f is None else (self.h, self.e, self.f)


class EnterCall(StepCall):
    """A call of `RecurrentBlock.enter`: what the block reads in loop t. It has no block output."""

    def __init__(self, module, h: Tensor, e: Tensor, t: int):
        super().__init__(module, h, e, None, None, None, t, False)

    def by_reference(self):
        """What `openmythos.RecurrentBlock` makes of this input."""
        return self.module.reference_enter(self)


def _halting(cfg, exit) -> tuple[ExitRule | None, ExitRule | None, str]:
    """The exit as a rule, the rule that decides in ACT's place (None: ACT does, or none), and how halted positions go
    on."""
    found = exit_rule(exit)
    return found, None if isinstance(found, ACT) else found, setting(cfg, "halting") if found is None else "freeze"


def _held(entry: LayerCache | None) -> int | None:
    """Tokens that every row of a cache holds; None where rows differ or nobody can say."""
    if entry is None:
        return 0
    return max(entry.lengths, default=0) if type(entry) is LayerCache and entry.uniform else None


def holds(entry: LayerCache | None, mask: Mask, rows: int) -> bool:
    """Whether `mask` shows a token per row all that its row of a cache holds, and nothing else."""
    if type(entry) is not LayerCache:
        return False
    if mask is None:
        return entry.uniform  # else the reference shows a short row what lies behind its end
    if type(mask) is not CausalMask:
        return False
    held, start = entry.lengths or [0] * rows, mask.start
    return all(n == start for n in held) if isinstance(start, int) else list(start) == held
