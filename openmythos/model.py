"""The Recurrent-Depth Transformer language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openmythos.attention import CausalMask
from openmythos.block import TransformerBlock
from openmythos.cache import KVCache, check_cache, reopen
from openmythos.config import MythosConfig, as_config, setting, whole_number
from openmythos.exits import Exit, exit_rule
from openmythos.generate import generate
from openmythos.layers import RMSNorm, rotary_table
from openmythos.recurrence import Loops, RecurrentBlock, initial_state, resolve_loops
from openmythos.trajectory import Trajectory

INITIAL_STD = 0.02  # of linear maps and embeddings
_TABLES = ("freqs_cis", "freqs_cis_mla")


class LanguageModel(nn.Module):
    """What all models here share: the token embedding (tied with the head), rotary tables and input checks.

    Attributes:
        default_generate_loops: loops of `generate` when called without n_loops; None means the configured number.
    """

    default_generate_loops: int | None = None

    def __init__(self, cfg: MythosConfig):
        super().__init__()
        cfg = as_config(cfg)
        cfg.validate()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.freqs_cis: Tensor
        self.freqs_cis_mla: Tensor
        for name, table in self._make_tables().items():
            self.register_buffer(name, table)

    def _finish(self) -> None:
        """Final norm, tied head and initialization; a subclass calls it after making its layers."""
        self.norm = RMSNorm(self.cfg.dim)
        self.head = nn.Linear(self.cfg.dim, self.cfg.vocab_size, bias=False)
        self._tie()
        # `load_state_dict(assign=True)` replaces each parameter by its own.
        self.register_load_state_dict_post_hook(LanguageModel._tie)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INITIAL_STD)

    def _tie(self, _keys=None) -> None:
        self.head.weight = self.embed.weight

    def _make_tables(self) -> dict[str, Tensor]:
        """Both rotary tables, since upstream's files hold both. The attention uses that of its type."""
        cfg = self.cfg
        widths = {"freqs_cis": cfg.dim // cfg.n_heads, "freqs_cis_mla": cfg.qk_rope_head_dim}
        return {name: rotary_table(width, cfg.max_seq_len, cfg.rope_theta) for name, width in widths.items()}

    def _apply(self, fn, recurse=True):
        # `.to(torch.bfloat16)` would cast the complex tables to real numbers. They follow the device alone, and are
        # computed again when they come from the meta device.
        tables: dict[str, Any] = {name: self._buffers.pop(name) for name in _TABLES}
        try:
            super()._apply(fn, recurse)
        finally:
            for name, table in tables.items():
                device = fn(torch.empty(0, device=table.device)).device
                if table.is_meta and device.type != "meta":
                    table = self._make_tables()[name]
                self._buffers[name] = table.to(device)
        self._tie()  # a move from or to the meta device makes new parameters
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # Files saved after upstream's `.to(torch.bfloat16)` hold tables without imaginary part: compute these again.
        damaged = [n for n in _TABLES if prefix + n in state_dict and not state_dict[prefix + n].is_complex()]
        if damaged:
            tables = self._make_tables()
            repaired = {prefix + n: tables[n].to(state_dict[prefix + n].device) for n in damaged}
            state_dict = {**state_dict, **repaired}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _embed(self, input_ids: Tensor, start_pos: int | Sequence[int] | Tensor, cached: bool):
        """Checks the input and embeds it.

        Returns:
            x (B, T, dim), freqs_cis of its positions, the causal mask, and start_pos as one int per row.
        """
        cfg = self.cfg
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32) or 0 in input_ids.shape:
            raise ValueError(
                f"input_ids: {input_ids.dtype} of shape {tuple(input_ids.shape)}: "
                "must be int64 or int32 (B, T), not empty"
            )
        weight = getattr(self.embed, "weight", None)  # what replaces the embedding may have none
        if weight is not None and input_ids.device != weight.device:
            raise ValueError(f"input_ids is on {input_ids.device}, the model on {weight.device}")
        batch, tokens = input_ids.shape
        if input_ids.device.type == "cpu" and type(input_ids) is Tensor and not torch.compiler.is_compiling():
            # On a GPU the check would make the host wait.
            low, high = (int(x) for x in input_ids.aminmax())
            if low < 0 or high >= cfg.vocab_size:
                raise ValueError(
                    f"input_ids: found {low} .. {high}: must be in 0 .. {cfg.vocab_size - 1} (vocab_size - 1)"
                )
        starts = start_pos.tolist() if hasattr(start_pos, "tolist") else start_pos  # a tensor, or numpy's
        starts = [starts] * batch if isinstance(starts, int) else starts
        starts = [whole_number(start) for start in starts] if isinstance(starts, (list, tuple)) else [None]
        if any(start is None for start in starts) or len(starts) != batch or min(starts) < 0:
            raise ValueError(f"start_pos = {start_pos!r}: must be an integer >= 0, or one per row ({batch})")
        if max(starts) + tokens > cfg.max_seq_len:
            raise ValueError(
                f"input_ids: {tokens} tokens from position {max(starts)} end past max_seq_len = {cfg.max_seq_len}"
            )
        table = self.freqs_cis_mla if cfg.attn_type == "mla" else self.freqs_cis
        if min(starts) == max(starts):
            freqs_cis = table[starts[0] : starts[0] + tokens]
            before = starts[0]
        else:
            position = torch.tensor(starts)[:, None] + torch.arange(tokens)
            freqs_cis = table[position.to(table.device)]
            before = starts
        # Without a cache the keys begin with the first token, whatever its position.
        mask = CausalMask(before if cached else 0, tokens)
        return self.embed(input_ids), freqs_cis, mask, starts

    def _logits(self, x: Tensor, logits_at: Tensor | None, return_hidden: bool = False) -> Tensor:
        if logits_at is not None:
            x = x[torch.arange(x.shape[0], device=x.device), logits_at].unsqueeze(1)
        x = self.normed(x)
        return x if return_hidden else self.head(x)

    def normed(self, x: Tensor) -> Tensor:
        """The head's input, (..., dim)."""
        return self.norm(x)

    def _layers(
        self,
        blocks: nn.ModuleList,
        name: str,
        x: Tensor,
        freqs_cis: Tensor,
        mask: CausalMask,
        kv_cache: dict | None,
        checkpointed: bool,
    ) -> Tensor:
        """x (B, T, dim) through one block after the other; block i has the cache key `name`_i."""
        if checkpointed and kv_cache is not None:
            raise ValueError("checkpoint_layers = True: must be False with a kv_cache, which a layer would fill twice")
        for i, block in enumerate(blocks):
            inputs = x, freqs_cis, mask, kv_cache, f"{name}_{i}"
            x = checkpoint(block, *inputs, use_reentrant=False) if checkpointed else block(*inputs)
        return x

    def decoder(self, kv_cache: KVCache, **depth) -> Callable[[Tensor], Tensor]:
        """A function that decodes one token per row: ids (B, 1) -> logits (B, 1, vocab_size).

        Args:
            kv_cache: a filled KVCache, which the function continues. It may be truncated between calls.
            depth: n_loops, for a model that has loops.
        """
        return lambda ids: self(ids, kv_cache=kv_cache, start_pos=kv_cache.lengths, **depth)

    def generate(
        self, input_ids, max_new_tokens: int = 64, n_loops=..., temperature: float = 1.0, top_k: int = 50, **options
    ):
        """Samples a continuation; see `openmythos.generate.generate` for the options.

        The order of arguments is open-mythos'. Without n_loops, `default_generate_loops` applies.
        """
        n_loops = self.default_generate_loops if n_loops is ... else n_loops
        return generate(
            self, input_ids, max_new_tokens, n_loops=n_loops, temperature=temperature, top_k=top_k, **options
        )


class OpenMythos(LanguageModel):
    """Embedding -> prelude blocks -> looped block -> coda blocks -> norm -> head.

    Raises:
        ValueError: for an impossible configuration.
    """

    def __init__(self, cfg: MythosConfig):
        super().__init__(cfg)
        cfg = self.cfg
        self.prelude = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.prelude_layers))
        self.recurrent = RecurrentBlock(cfg)
        self.coda = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.coda_layers))
        self._finish()

    def forward(
        self,
        input_ids: Tensor,
        n_loops: Loops = None,
        kv_cache: dict | None = None,
        start_pos: int | Sequence[int] | Tensor = 0,
        logits_at: Tensor | None = None,
        return_ponder: bool = False,
        grad_loops: int | None = None,
        checkpoint_loops: bool = False,
        exit: Exit = None,
        checkpoint_layers: bool = False,
        return_hidden: bool = False,
        return_trajectory: bool = False,
    ):
        """
        Args:
            input_ids: (B, T) int64 or int32.
            n_loops: loops of the recurrent block; None means cfg.max_loop_iters. May exceed it. A list gives every
                sequence its own.
            kv_cache: a KVCache or a plain dict to append to; prompts may come in chunks.
            start_pos: position of the first token, or one per row. With a cache: the number of tokens it holds.
            logits_at: (B,) int64, the index of the one token per row to compute logits of; None means all.
            return_ponder: also return ACT's ponder cost of each position, (B, T).
            grad_loops, checkpoint_loops, exit: see `RecurrentBlock.forward`.
            checkpoint_layers: keep only the inputs of each prelude and coda block for the backward pass.
            return_hidden: the head's input in place of logits, for losses that apply the head in chunks.
            return_trajectory: states, halting probabilities and logits of every loop, of a run in which nothing halts.

        Returns:
            Logits (B, T, vocab_size), or (B, 1, vocab_size) with logits_at; with return_hidden dim channels instead of
            vocab_size; with return_ponder a pair; with return_trajectory an `openmythos.trajectory.Trajectory`.

        Raises:
            ValueError: naming the argument, what came and what was expected.
        """
        n_loops = resolve_loops(n_loops, self.cfg, len(input_ids))
        x, freqs_cis, mask, starts = self._embed(input_ids, start_pos, kv_cache is not None)
        if kv_cache is not None:
            freezes = exit is not None or setting(self.cfg, "halting") == "freeze"
            check_cache(kv_cache, starts, n_loops if isinstance(n_loops, int) else max(n_loops), freezes)
        if return_trajectory:
            if logits_at is not None:
                raise ValueError("logits_at: must be None with return_trajectory = True")
            given = kv_cache, return_ponder, grad_loops, checkpoint_loops, exit, checkpoint_layers
            seen = self._trajectory(x, freqs_cis, mask, n_loops, *given)
            return seen._replace(output=self._logits(seen.output, None, return_hidden))
        options = return_ponder, grad_loops, checkpoint_loops, exit, checkpoint_layers
        x, ponder = self.through(x, freqs_cis, mask, n_loops, kv_cache, *options)
        logits = self._logits(x, logits_at, return_hidden)
        return (logits, ponder) if return_ponder else logits

    def through(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        mask: CausalMask,
        n_loops: Loops,
        kv_cache: dict | None = None,
        return_ponder: bool = False,
        grad_loops: int | None = None,
        checkpoint_loops: bool = False,
        exit: Exit = None,
        checkpoint_layers: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, T, dim) -> the final norm's input (B, T, dim), and the ponder cost (B, T) or None."""
        x = self._layers(self.prelude, "prelude", x, freqs_cis, mask, kv_cache, checkpoint_layers)
        begin = getattr(self.recurrent, "initial_state", None) or partial(initial_state, self.cfg)  # a wrapper has none
        h = begin(x)
        rule, options = exit_rule(exit), (return_ponder, grad_loops, checkpoint_loops)
        if rule is None:
            x = self.recurrent(h, x, freqs_cis, mask, n_loops, kv_cache, *options)
        else:
            predict = partial(self._predict, freqs_cis, mask, kv_cache) if rule.predicts else None
            x = self.recurrent(h, x, freqs_cis, mask, n_loops, kv_cache, *options, exit=rule, predict=predict)
        x, ponder = x if return_ponder else (x, None)
        return self._layers(self.coda, "coda", x, freqs_cis, mask, kv_cache, checkpoint_layers), ponder

    def _trajectory(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        mask: CausalMask,
        n_loops: Loops,
        kv_cache: dict | None,
        return_ponder: bool,
        grad_loops: int | None,
        checkpoint_loops: bool,
        exit: Exit,
        checkpoint_layers: bool,
    ) -> Trajectory:
        """As `through`, of every loop; its output is the final norm's input. The coda runs once, on all of them."""
        x = self._layers(self.prelude, "prelude", x, freqs_cis, mask, kv_cache, checkpoint_layers)
        begin = getattr(self.recurrent, "initial_state", None) or partial(initial_state, self.cfg)
        given = return_ponder, grad_loops, checkpoint_loops, exit, None, True
        # Hooks on the recurrent block may have made a plain tuple of it.
        seen = Trajectory(*self.recurrent(begin(x), x, freqs_cis, mask, n_loops, kv_cache, *given))
        freqs_cis = freqs_cis[seen.sequence] if freqs_cis.dim() == 3 else freqs_cis
        return seen._replace(
            output=self._layers(self.coda, "coda", seen.output, freqs_cis, mask, None, checkpoint_layers)
        )

    def _predict(
        self, freqs_cis: Tensor, mask: CausalMask, kv_cache: dict | None, h: Tensor, through_coda: bool
    ) -> Tensor:
        """Logits of states h (B, T, dim) between two loops. What the coda keeps of them is dropped again."""
        x = self.recurrent.injection.readout(h)
        if through_coda:
            x = self._layers(self.coda, "coda", x, freqs_cis, mask, kv_cache, False)
            if kv_cache is not None:
                for i in range(len(self.coda)):
                    reopen(kv_cache, f"coda_{i}", h.shape[1])
        return self.head(self.normed(x))
