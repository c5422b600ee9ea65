"""What a user asks of an engine, and the handle that he gets for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openmythos.config import is_row, whole_number
from openmythos.exits import Exit, ExitRule, exit_rule
from openmythos.generate import check_options, distribution, end_tokens, prompt_row
from openmythos.recurrence import resolve_loops

if TYPE_CHECKING:
    from openmythos_kernels.serve.engine import Engine


@dataclass(frozen=True)
class Request:
    """A checked request; the arguments of `Engine.submit`."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    ends: frozenset[int]
    n_loops: int
    exit: ExitRule | None
    generator: torch.Generator

    @property
    def tokens(self) -> int:
        """Tokens that the caches hold at most: the last new one is not computed."""
        return len(self.prompt) + max(self.max_new_tokens - 1, 0)

    @property
    def options(self) -> tuple[float, int, float]:
        """What `distribution` takes of a request."""
        return self.temperature, self.top_k, self.top_p

    def sample(self, logits: Tensor) -> int:
        """The next token, from logits (vocab,).

        Raises:
            ValueError: they have a NaN.
            RuntimeError: they are not finite.
        """
        (token,) = sample_each([self], logits[None])
        if isinstance(token, Exception):
            raise token
        return token


def sample_each(requests: Sequence[Request], logits: Tensor) -> list[int | Exception]:
    """The next token of each request, from logits (N, vocab), or why there is none.

    Each request draws from a generator of its own. What they draw from is computed together: rows do not depend on one
    another.
    """
    found: list[int | Exception] = [ValueError("logits: found NaN, so no token can be chosen") for _ in requests]
    alike: dict[tuple, list[int]] = {}
    for i, nan in enumerate(logits.isnan().any(-1).tolist()):
        if not nan:
            alike.setdefault(requests[i].options, []).append(i)
    for (temperature, top_k, top_p), places in alike.items():
        mine = logits if len(places) == len(logits) else logits[places]
        if temperature == 0:
            for i, token in zip(places, mine.argmax(-1).tolist()):
                found[i] = token
            continue
        for i, row in zip(places, distribution(mine, temperature, top_k, top_p)):
            try:
                found[i] = int(torch.multinomial(row, 1, generator=requests[i].generator))
            except RuntimeError as error:  # infinite logits
                found[i] = error
    return found


def checked(
    cfg,
    device: torch.device,
    prompt: Tensor | Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    eos: int | Sequence[int] | None,
    seed: int | None,
    n_loops: int | None,
    exit: Exit,
) -> Request:
    """A request from the arguments of `Engine.submit`.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    row, ends = prompt_row("prompt", prompt), end_tokens(eos)
    check_options(cfg, [row], max_new_tokens, temperature, top_k, top_p, eos, ends)
    ids = row.tolist()
    if min(ids) < 0 or max(ids) >= cfg.vocab_size:
        raise ValueError(f"prompt: found tokens {min(ids)} .. {max(ids)}: must be in 0 .. {cfg.vocab_size - 1}")
    if is_row(n_loops):
        raise ValueError(f"n_loops = {n_loops!r}: a request has one number of loops")
    if seed is not None and whole_number(seed) is None:
        raise ValueError(f"seed = {seed!r}: must be an integer or None")
    rule = exit_rule(exit)
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(int(seed))
    loops = resolve_loops(n_loops, cfg)
    return Request(ids, int(max_new_tokens), temperature, int(top_k), top_p, frozenset(ends), loops, rule, generator)


class Handle:
    """A request in an engine. Iterating yields its new tokens as they come; that drives the engine.

    Attributes:
        request: what was asked.
        tokens: the new tokens so far, an eos included.
        depths: how many loops each computed position ran, from the prompt's first on.
        finished: why there will be no more tokens: "eos", "length", "cancelled", "failed"; empty while there may be.
        error: what a failed request failed with.
    """

    def __init__(self, engine: Engine, request: Request):
        self._engine, self.request = engine, request
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.finished = ""
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[int]:
        """Every new token from the first on, also for a second iteration.

        Raises:
            RuntimeError: the request failed, once its tokens are through.
        """
        given = 0
        while True:
            finished = self.finished  # read before the tokens: another thread may add the last one
            while given < len(self.tokens):
                given += 1
                yield self.tokens[given - 1]
            if finished == "failed":
                raise RuntimeError(f"the request failed: {self.error}") from self.error
            if finished:
                return
            self._engine.step()

    def result(self) -> Tensor:
        """All new tokens, (n,) int64; those so far if the request was cancelled.

        Raises:
            RuntimeError: the request failed.
        """
        return torch.tensor(list(self), dtype=torch.int64)

    def cancel(self) -> None:
        """Ends the request, wherever it is. Tokens that it has stay; others lose none."""
        self._engine.cancel(self)
