"""Model configuration, validated when it is made."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

ATTN_TYPES = ("mla", "gqa")
INJECTIONS = ("mythos", "residual", "parcae", "concat", "add")
INITIAL_STATES = ("e", "zeros", "noise")
HALTINGS = ("evolve", "freeze", "off")
REMAINDERS = ("drop", "last")
CORE_FFNS = ("moe", "dense")


@dataclass
class MythosConfig:
    """Hyperparameters of a Recurrent-Depth Transformer.

    The fields up to dropout have the names and defaults of the public `open-mythos` package. The others are ours; their
    defaults reproduce that package. Integers and floats of numpy are accepted and become Python's.

    Attributes:
        vocab_size: tokens that there are.
        dim: width of the model.
        n_heads: attention heads.
        n_kv_heads: heads of keys and values, for GQA.
        max_seq_len: length of the rotary tables.
        max_loop_iters: default number of loops, and rows of the depth-wise LoRA's table.
        prelude_layers: blocks before the loop.
        coda_layers: blocks after the loop.
        attn_type: mla (latent attention) or gqa (grouped-query attention).
        kv_lora_rank: width of the cached latent.
        q_lora_rank: width of the queries' latent.
        qk_rope_head_dim: channels per head of queries and keys with rotary positions.
        qk_nope_head_dim: channels per head of queries and keys without.
        v_head_dim: channels per head of values.
        n_experts: routed experts.
        n_shared_experts: experts that see every token, each of inner width expert_dim * n_experts_per_tok.
        n_experts_per_tok: routed experts per token.
        expert_dim: inner width of a routed expert.
        act_threshold: a position halts once its halting probabilities add up to this. It may exceed 1: the sum then
            takes more loops, and with a large threshold nothing halts.
        rope_theta: base of the rotary angles.
        lora_rank: rank of the depth-wise LoRA; 0: none.
        max_output_tokens: kept for files of that package; nothing reads it.
        dropout: probability of dropout after attention and FFN.
        injection: how a loop's input enters the state; see `openmythos.injection`.
        h0: state before the first loop: e (the prelude's output), zeros, or noise (truncated normal).
        halting: evolve (a halted position is still updated, with weight 0 in the output), freeze (its state and keys
            stay as they are), off (no ACT; the last state is the output).
        act_remainder: weight of the last loop at positions that never crossed the threshold: drop gives p, last gives
            all that is left (Graves, 2016).
        core_layers: blocks inside the loop; upstream has 1.
        core_ffn: FFN of the looped blocks, moe or dense.
        ffn_dim: inner width of dense FFNs; None means dim * 4 // 3.
        halt_bias: initial bias of the halting layer; 0 leaves upstream's small random one. Training from 0 collapses to
            one or two loops; from -3, where a loop's halting probability begins at 0.05, it does not.

    Raises:
        ValueError: naming the field, its value and the rule it breaks.
    """

    vocab_size: int = 32000
    dim: int = 2048
    n_heads: int = 16
    n_kv_heads: int = 4
    max_seq_len: int = 4096
    max_loop_iters: int = 16
    prelude_layers: int = 2
    coda_layers: int = 2
    attn_type: str = "mla"
    kv_lora_rank: int = 512
    q_lora_rank: int = 1536
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    n_experts: int = 64
    n_shared_experts: int = 2
    n_experts_per_tok: int = 4
    expert_dim: int = 512
    act_threshold: float = 0.99
    rope_theta: float = 500000.0
    lora_rank: int = 16
    max_output_tokens: int = 4096
    dropout: float = 0.0

    injection: str = "mythos"
    h0: str = "e"
    halting: str = "evolve"
    act_remainder: str = "drop"
    core_layers: int = 1
    core_ffn: str = "moe"
    ffn_dim: int | None = None
    halt_bias: float = 0.0

    def __post_init__(self) -> None:
        self.validate()

    @property
    def dense_dim(self) -> int:
        """Inner width of the dense FFNs."""
        return self.dim * 4 // 3 if self.ffn_dim is None else self.ffn_dim

    @property
    def rope_dim(self) -> int:
        """Rotated channels per head of the chosen attention."""
        return self.qk_rope_head_dim if self.attn_type == "mla" else self.dim // self.n_heads

    def validate(self) -> None:
        """Checks every field. Models call it again, since fields may be set after construction."""
        for name in _AT_LEAST_ONE:
            self._integer(name, 1)
        for name in _AT_LEAST_ZERO:
            self._integer(name, 0)
        for name, allowed in _CHOICES.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        if self.ffn_dim is not None:
            self._integer("ffn_dim", 1)
        for name in ("act_threshold", "rope_theta", "dropout", "halt_bias"):
            value = getattr(self, name)
            self._require(name, isinstance(value, Real) and not isinstance(value, bool), "a number")
            if not isinstance(value, (int, float)):
                setattr(self, name, float(value))
        self._require("dim", self.dim >= 2, "at least 2")
        if self.attn_type == "gqa":
            self._require("n_heads", self.dim % self.n_heads == 0, f"a divisor of dim={self.dim}")
            self._require("n_kv_heads", self.n_heads % self.n_kv_heads == 0, f"a divisor of n_heads={self.n_heads}")
            head_dim = self.dim // self.n_heads
            self._require("n_heads", head_dim % 2 == 0, f"such that dim / n_heads = {head_dim} is even (rotary pairs)")
        self._require("qk_rope_head_dim", self.qk_rope_head_dim % 2 == 0, "even (rotary pairs)")
        self._require("n_experts_per_tok", self.n_experts_per_tok <= self.n_experts, f"<= n_experts={self.n_experts}")
        self._require("act_threshold", self.act_threshold > 0, "> 0")
        self._require("rope_theta", 0 < self.rope_theta < float("inf"), "> 0 and finite")
        self._require("halt_bias", abs(self.halt_bias) < float("inf"), "finite")
        self._require("dropout", 0 <= self.dropout < 1, "in [0, 1)")

    def _integer(self, name: str, least: int) -> None:
        setattr(self, name, checked_integer(f"MythosConfig.{name}", getattr(self, name), least))

    def _require(self, name: str, ok: bool, rule: str) -> None:
        if not ok:
            raise ValueError(f"MythosConfig.{name} = {getattr(self, name)!r}: must be {rule}")


def whole_number(value: Any) -> int | None:
    """`value` as an int if it is one integer of Python, numpy or a tensor; else, and for a bool, None."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def checked_integer(name: str, value: Any, least: int) -> int:
    """`value` as an int.

    Raises:
        ValueError: naming the argument, if it is no integer or less than `least`.
    """
    number = whole_number(value)
    if number is None or number < least:
        raise ValueError(f"{name} = {value!r}: must be an integer >= {least}")
    return number


def is_row(value: Any) -> bool:
    """Whether `value` is several values in a row: a list, a tuple, a 1-D array or tensor."""
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) == 1


def setting(cfg: Any, name: str) -> Any:
    """A field of a configuration; our default if `cfg` is open-mythos' configuration object, which lacks our fields."""
    return getattr(cfg, name, getattr(MythosConfig, name))


def as_config(cfg: Any) -> MythosConfig:
    """`cfg` itself, or a MythosConfig with the values of open-mythos' configuration object.

    Raises:
        ValueError: for a value that MythosConfig refuses.
    """
    if isinstance(cfg, MythosConfig):
        return cfg
    return MythosConfig(**{f.name: getattr(cfg, f.name) for f in fields(MythosConfig) if hasattr(cfg, f.name)})


_AT_LEAST_ONE = [
    "vocab_size",
    "n_heads",
    "n_kv_heads",
    "max_seq_len",
    "max_loop_iters",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "n_experts",
    "n_experts_per_tok",
    "expert_dim",
    "max_output_tokens",
    "core_layers",
    "dim",
]
_AT_LEAST_ZERO = ("prelude_layers", "coda_layers", "n_shared_experts", "lora_rank")
_CHOICES = {
    "attn_type": ATTN_TYPES,
    "injection": INJECTIONS,
    "h0": INITIAL_STATES,
    "halting": HALTINGS,
    "act_remainder": REMAINDERS,
    "core_ffn": CORE_FFNS,
}
