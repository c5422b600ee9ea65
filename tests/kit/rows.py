"""A recurrent block's tokens as rows of `loop_rows`, over a ragged cache."""

from __future__ import annotations

import copy

import torch

from openmythos.cache import KVCache
from openmythos.injection import loop_index_embedding
from openmythos.layers import rotary_table
from openmythos_kernels import accelerate
from openmythos_kernels.nn.paths import fused_step
from openmythos_kernels.nn.paths.decode_block import packed, weights_of
from openmythos_kernels.nn.paths.decode_loop import blocks_of
from openmythos_kernels.ops.layer import LoraWeights
from tests.kit.loop import small_block

__all__ = ["KVCache", "Tokens", "block", "freqs"]


def block(seed=0, dtype=torch.float64, **fields):
    """A reference block whose positions halt in different loops."""
    torch.manual_seed(seed)
    made = small_block(0.3, **fields).to(dtype).eval().requires_grad_(False)
    made.act.halt.weight.mul_(2)
    made.act.halt.bias.fill_(-1.5)
    return made


def freqs(block, tokens):
    """(cos, sin) of the first positions, complex64 (tokens, rope / 2)."""
    return rotary_table(block.cfg.qk_rope_head_dim, tokens, 100.0)


class Tokens:
    """Runs tokens of S sequences by `function`, which has the arguments of `loop_rows`.

    Args:
        recurrent: the reference block; it stays as it is.
        depth: loops that the table has room for.
        keep: slots of a token.
    """

    def __init__(self, function, recurrent, sequences, tokens, depth, keep=0):
        fast = accelerate(copy.deepcopy(recurrent))
        cfg, blocks = recurrent.cfg, blocks_of(fast)[0]
        weight, slots = fast.norm.weight, min(depth, keep) if keep else depth
        self.function, self.cfg, self.keep, self.depth = function, cfg, keep, depth
        self.first = (torch.arange(sequences * tokens) * slots).view(sequences, tokens).int()
        self.last = torch.zeros_like(self.first)
        self.freqs = torch.view_as_real(freqs(recurrent, tokens))
        rows, widths = sequences * tokens * slots, (cfg.kv_lora_rank, cfg.qk_rope_head_dim)
        self.pools = [[weight.new_full((rows, n), float("nan")) for _ in blocks] for n in widths]
        self.blocks, lora = weights_of(blocks), fast.lora
        lora_B, step = fused_step.weights(fast)
        self.lora = [] if lora is None else packed(LoraWeights(lora.down.weight, lora.scale.weight, lora_B))
        self.step = packed(step)
        self.embeddings = [loop_index_embedding(t, cfg.dim // 8, dtype=weight.dtype) for t in range(depth)]
        self.eps = fast.norm.eps

    def start(self, h, e, sequence, position, limit):
        """The state of rows before their first loop: the arguments up to `position`."""
        wide = torch.zeros(len(h), dtype=torch.promote_types(h.dtype, torch.float32))
        return dict(
            h=h.clone(),
            e=e.clone(),
            h_out=torch.zeros_like(h),
            cumulative_p=wide,
            ponder=wide.clone(),
            running=torch.ones(len(h), dtype=torch.bool),
            loop=torch.zeros(len(h), dtype=torch.int64),
            limit=torch.as_tensor(limit).expand(len(h)).clone(),
            freqs=self.freqs[position],
            sequence=sequence,
            position=position,
        )

    def run(self, state, loops, **options):
        """Runs up to `loops` loops of the rows; their state is changed in place."""
        settings = dict(
            keep=self.keep,
            eps=self.eps,
            threshold=float(self.cfg.act_threshold),
            spend_remainder=self.cfg.act_remainder == "last",
            residual=self.cfg.injection == "residual",
            freeze=self.cfg.halting == "freeze",
            act=self.cfg.halting != "off",
            loops=loops,
        )
        table = self.first, self.last, *self.pools
        weights = self.blocks, self.lora, self.step, self.embeddings
        return self.function(*state.values(), *table, *weights, **settings | options)
