"""Sampling text from a model, token by token, through a KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from openmythos.cache import KVCache
from openmythos.config import is_row, whole_number
from openmythos.dropout import without_dropout
from openmythos.exits import Exit, exit_rule

Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


def generate(model, prompts: Prompts, max_new_tokens: int = 64, **options) -> Tensor | list[Tensor]:
    """Prompts with their continuations.

    Args:
        model: an OpenMythos or DenseTransformer.
        prompts: (B, T) int64, or a list of B prompts of any lengths.
        max_new_tokens: tokens to add at most.
        options: as for `stream`.

    Returns:
        For a tensor, (B, T + new); rows that ended early are padded with eos. For a list, B 1-D tensors, each up to
        and including its first eos.

    Raises:
        ValueError: as `stream`.
    """
    rows = prompt_rows(prompts)
    device = next(model.parameters()).device
    steps = list(stream(model, prompts, max_new_tokens, **options))
    new = torch.stack(steps, dim=1) if steps else torch.empty(len(rows), 0, dtype=torch.int64, device=device)
    if isinstance(prompts, Tensor):
        return torch.cat((prompts.to(new), new), dim=1)
    ends = end_tokens(options.get("eos"))
    return [torch.cat((row.to(device), _until(ends, added))) for row, added in zip(rows, new)]


@torch.no_grad()
def stream(
    model,
    prompts: Prompts,
    max_new_tokens: int = 64,
    *,
    n_loops: int | None = None,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    eos: int | Sequence[int] | None = None,
    seed: int | None = None,
    exit: Exit = None,
    kv_loops: str | int = "each",
) -> Iterator[Tensor]:
    """Yields the next token of every row, (B,) int64, as soon as it is sampled.

    Args:
        n_loops: loops of the recurrent block in prefill and decode; None means the configured number.
        temperature: 0 is greedy.
        top_k: sample among the k likeliest tokens; 0 or less means all.
        top_p: sample among the likeliest tokens that together have this probability; 1 means all.
        eos: a token that ends a row, or several. A row that has ended yields the first of them from then on; the
            stream ends once all rows have.
        seed: makes sampling repeatable and leaves the global generator alone.
        exit: who decides that a token halts; see `RecurrentBlock.forward`.
        kv_loops: what looped layers keep of a token; `loops` of `KVCache`.

    Dropout is off in the model calls of the stream, on this thread alone. No training flag changes, so streams may
    overlap with each other and with training.

    Raises:
        ValueError: naming the argument (prompts that do not fit max_seq_len included).
    """
    rows = prompt_rows(prompts)
    ends = end_tokens(eos)
    check_options(model.cfg, rows, max_new_tokens, temperature, top_k, top_p, eos, ends)
    max_new_tokens, top_k = int(max_new_tokens), int(top_k)
    device = next(model.parameters()).device
    lengths = [len(row) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64, device=device)
    for b, row in enumerate(rows):
        ids[b, : lengths[b]] = row
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    depth: dict = {} if n_loops is None else {"n_loops": n_loops}
    if exit is not None:
        depth["exit"] = exit_rule(exit)
    nothing_dropped = without_dropout(model)
    cache = KVCache(max(lengths) + max_new_tokens, kv_loops)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    last = torch.tensor(lengths, device=device) - 1
    decode = model.decoder(cache, **depth)
    for step in range(max_new_tokens):
        with nothing_dropped:  # left before the caller gets the token
            if step == 0:
                logits = model(ids, kv_cache=cache, logits_at=last, **depth)[:, 0]
                cache.truncate(lengths)  # the padding behind shorter prompts
            else:
                logits = decode(ids)[:, 0]
        token = sample(logits, temperature, top_k, top_p, generator)
        if ends:
            token = torch.where(ended, ends[0], token)
            for end in ends:
                ended |= token == end
        yield token
        if ends and ended.all():
            return
        ids = token[:, None]


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator=None) -> Tensor:
    """One token per row from logits (B, vocab): (B,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(distribution(logits, temperature, top_k, top_p), 1, generator=generator)[:, 0]


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """What `sample` draws from at a temperature above 0: probabilities (B, vocab), float32."""
    logits = logits.float()
    # Any positive divisor keeps the largest at 0, but 0 / 0 is NaN: float32 may round a temperature to 0.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(float(temperature), torch.finfo(torch.float32).tiny)
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        prob = ordered.softmax(-1)
        beyond = prob.cumsum(-1) - prob >= top_p
        beyond[:, 0] = False  # the likeliest token stays even where top_p rounds to 0
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), float("-inf"))
    return logits.softmax(-1)


def prompt_rows(prompts: Prompts) -> list[Tensor]:
    rows = [prompt_row(f"prompts[{b}]", row) for b, row in enumerate(prompts)]
    if not rows:
        raise ValueError("prompts: got none: must hold at least one")
    return rows


def prompt_row(name: str, row: Any) -> Tensor:
    """A prompt as a tensor (n,).

    Raises:
        ValueError: naming the argument, if it is not a non-empty row of integers.
    """
    row = torch.as_tensor(row)
    if row.dim() != 1 or not row.numel() or row.is_floating_point():
        raise ValueError(
            f"{name}: {row.dtype} of shape {tuple(row.shape)}: must be a non-empty row of integer token ids"
        )
    return row


def end_tokens(eos) -> list:
    """The tokens that end a row, as a list; `check_options` refuses those that are no integers."""
    if eos is None:
        return []
    return [token if (number := whole_number(token)) is None else number for token in (eos if is_row(eos) else [eos])]


def _until(ends: Sequence[int], tokens: Tensor) -> Tensor:
    """`tokens` up to and including the first one that ends a row."""
    found = torch.isin(tokens, tokens.new_tensor(ends)).nonzero()
    return tokens[: int(found[0]) + 1] if len(found) else tokens


def check_options(cfg, rows, max_new_tokens, temperature, top_k, top_p, eos, ends) -> None:
    def require(ok, name, value, rule):
        if not ok:
            raise ValueError(f"{name} = {value!r}: must be {rule}")

    def integer(value, least):
        return (number := whole_number(value)) is not None and number >= least

    require(integer(max_new_tokens, 0), "max_new_tokens", max_new_tokens, "an integer >= 0")
    longest = max(len(row) for row in rows)
    room = cfg.max_seq_len - longest
    require(
        max_new_tokens <= room,
        "max_new_tokens",
        max_new_tokens,
        f"<= {room}: the longest prompt has {longest} tokens and max_seq_len is {cfg.max_seq_len}",
    )
    require(temperature >= 0, "temperature", temperature, ">= 0")
    require(whole_number(top_k) is not None, "top_k", top_k, "an integer")
    require(0 < top_p <= 1, "top_p", top_p, "in (0, 1]")
    named = [integer(end, 0) and end < cfg.vocab_size for end in ends]
    require(eos is None or (named and all(named)), "eos", eos, f"None or in 0 .. {cfg.vocab_size - 1}, or several such")
