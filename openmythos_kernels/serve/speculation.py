"""Lossless self-speculation: a model drafts with few loops, and its own remaining loops verify the drafts.

A loop's latents depend on that loop and the earlier ones alone. So the first d loops of a drafted token are what plain
decoding would compute, provided the token is right: verification goes on from the drafts' own states instead of
computing them again. A round costs (k + 1) * d + (T - d) loops in sequence and gives 1 to k + 1 tokens; plain decoding
takes T loops for each.

Only the coda's latents of a draft differ, since its coda read a state of d loops: the coda of the verification
overwrites them all. Sampling accepts and rejects as Leviathan et al. (2023, arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from openmythos import debug
from openmythos.config import is_row, whole_number
from openmythos.generate import distribution
from openmythos_kernels.serve.request import Request, checked
from openmythos_kernels.serve.rows import Rows, Tokens
from openmythos_kernels.serve.sequences import Sequences
from openmythos_kernels.serve.watching import watch
from openmythos_kernels.serve.weights import Weights

CHUNK = 64  # tokens of the prompt at a time


def speculative_stream(
    model,
    prompt: Tensor | Sequence[int],
    max_new_tokens: int = 64,
    *,
    speculate: tuple[int, int],
    n_loops: int | None = None,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    eos: int | Sequence[int] | None = None,
    seed: int | None = None,
) -> Speculation:
    """An iterator over the tokens that follow a prompt.

    Greedy tokens are those of plain decoding (k = 0, or an `Engine`), to the bit on a CPU. Sampled tokens have exactly
    its distribution.

    Args:
        model, prompt, max_new_tokens, n_loops, temperature, top_k, top_p, eos, seed: as of `Engine` and its `submit`.
        speculate: (d, k): k tokens are drafted with d loops each, then verified together. k = 0 drafts none.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    weights = Weights(model)
    request = checked(
        model.cfg, weights.device, prompt, max_new_tokens, temperature, top_k, top_p, eos, seed, n_loops, None
    )
    d, k = _checked_pair(speculate, request.n_loops)
    return Speculation(_Stream(weights, request, d, k), request)


def _checked_pair(speculate, loops: int) -> tuple[int, int]:
    pair = [whole_number(x) for x in speculate] if is_row(speculate) else []
    numbers = [x for x in pair if x is not None]
    if not len(pair) == len(numbers) == 2 or not 1 <= numbers[0] <= loops or numbers[1] < 0:
        raise ValueError(
            f"speculate = {speculate!r}: must be (d, k), d loops in 1 .. {loops} for each of k >= 0 drafted tokens"
        )
    return numbers[0], numbers[1]


class Speculation(Iterator[int]):
    """The tokens of one `speculative_stream`, each computed when it is asked for.

    Attributes:
        rounds: verifications so far, each of some drafts. drafted, accepted: drafts in them, and those that stood.
    """

    def __init__(self, stream: _Stream, request: Request):
        self.rounds = self.drafted = self.accepted = 0
        self._stream, self._request, self._left = stream, request, request.max_new_tokens
        self._token: int | None = None  # the newest that was asked for
        self._ready: list[int] = []  # those behind it that are computed

    def __next__(self) -> int:
        left, self._left = self._left, 0  # an error ends the stream
        if not left:
            raise StopIteration
        if not self._ready:
            self._ready = [self._stream.begin()] if self._token is None else self._round(self._token, left)
        self._token, *self._ready = self._ready
        self._left = 0 if self._token in self._request.ends else left - 1
        return self._token

    def _round(self, token: int, left: int) -> list[int]:
        new = self._stream.round(token, left)
        self.rounds += 1
        self.drafted += min(self._stream.k, left - 1)
        self.accepted += len(new) - 1
        return new


class _Stream:
    """One sequence whose tokens are drafted and verified."""

    def __init__(self, weights: Weights, request: Request, d: int, k: int):
        self.request, self.d, self.k = request, d, k
        self.limit = request.n_loops
        self.freeze, self.act = weights.halting == "freeze", weights.halting != "off"
        self.sequences = Sequences(weights, 1)
        self.rows = Rows.free(max(CHUNK, k + 1), weights)
        self.held = 0  # tokens that have entered

    @torch.no_grad()
    def begin(self) -> int:
        """Computes the prompt; returns the first new token."""
        prompt = self.request.prompt
        for start in range(0, len(prompt), CHUNK):
            rows = self._enter(0, prompt[start : start + CHUNK])
            self._loop(rows, self.limit)
            logits = self._logits(rows.h_out, rows, slice(-1, None))
            self._settle(rows, len(rows.loop))
        return self.request.sample(logits[0])

    @torch.no_grad()
    def round(self, token: int, left: int) -> list[int]:
        """What follows `token`, the newest one: 1 to k + 1 tokens, `left` at most."""
        drafts, guessed = [token], []
        for i in range(min(self.k, left - 1)):
            rows = self._enter(i, drafts[-1:])
            self._loop(rows, self.d)
            guess = self._logits(self._early(rows), rows)[0]
            guessed.append(guess)
            drafts.append(self.request.sample(guess))
        self._loop(self._enter(len(guessed), drafts[-1:]), self.d)
        rows = self.rows[: len(drafts)]
        self._loop(rows, self.limit - self.d)
        new = self._accepted(drafts[1:], guessed, self._logits(rows.h_out, rows))
        self._settle(rows, len(new))
        return new

    def _accepted(self, drafts: list[int], guessed: list[Tensor], logits: Tensor) -> list[int]:
        """The drafts up to the first wrong one, and what stands in its place or behind them all."""
        new = []
        for draft, guess, right in zip(drafts, guessed, logits):
            token = self._judge(draft, guess, right)
            new.append(draft if token is None else token)
            if token is not None:
                return new
        return [*new, self.request.sample(logits[len(drafts)])]

    def _judge(self, draft: int, guess: Tensor, right: Tensor) -> int | None:
        """None if a draft from logits `guess` stands as a token from logits `right`; else the token in its place."""
        request = self.request
        if request.temperature == 0:
            token = request.sample(right)
            return None if token == draft else token
        options = request.temperature, request.top_k, request.top_p
        (q,), (p,) = distribution(guess[None], *options), distribution(right[None], *options)
        if torch.rand((), generator=request.generator, device=p.device) * q[draft] < p[draft]:
            return None
        rest = (p - q).clamp(min=0)
        # q >= p everywhere only where both are equal up to rounding.
        return int(torch.multinomial(rest if rest.any() else p, 1, generator=request.generator))

    def _enter(self, at: int, ids: list[int]) -> Rows:
        """The next tokens through the prelude, into the rows from `at` on; returns these rows."""
        weights, sequences, n = self.sequences.weights, self.sequences, len(ids)
        sequences.append([0], n, [self.limit])
        position = torch.arange(self.held, self.held + n, device=weights.device)
        tokens = Tokens(torch.zeros_like(position), position)
        e = sequences.enter(torch.tensor(ids, device=weights.device), tokens)
        rows = torch.arange(at, at + n, device=weights.device)
        limit = torch.full_like(rows, self.limit)
        self.rows.start(rows, e, sequences.initial(e), limit, weights.angles[position], tokens)
        self.held += n
        return self.rows[at : at + n]

    def _loop(self, rows: Rows, loops: int) -> None:
        self.sequences.loop(rows, rows.limit, self.limit, act=self.act, freeze=self.freeze, loops=loops)
        debug.check_states("in the loop", rows.h)

    def _early(self, rows: Rows) -> Tensor:
        """The loop's output if it ended here: with ACT the state gets all the weight that is left."""
        if not self.act:
            return rows.h_out
        left = (1 - rows.cumulative_p).clamp(min=0) * rows.running
        return (rows.h_out + left[:, None] * rows.h).to(rows.h.dtype)

    def _logits(self, out: Tensor, rows: Rows, part: slice = slice(None)) -> Tensor:
        """The loop's output through the coda, and some of it through the head."""
        x = self.sequences.leave(out, Tokens(rows.sequence, rows.position))
        return self.sequences.logits(x[part])

    def _settle(self, rows: Rows, count: int) -> None:
        """Keeps the first `count` tokens of `rows`, the newest ones, and the latents that they have."""
        start = self.held - len(rows.loop)
        self.held = start + count
        self.sequences.truncate(0, self.held)
        loops = rows.loop[:count].tolist()
        self.sequences.settle(0, start, loops, self.limit)
        watch(self.sequences.weights, None, loops, rows.ponder[:count])
