"""Depth-wise continuous batching: every loop of the block serves all requests, each at a loop of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from openmythos import debug
from openmythos.config import checked_integer
from openmythos.exits import Exit
from openmythos.generate import Prompts, prompt_rows
from openmythos_kernels.serve.budget import Budget
from openmythos_kernels.serve.deciding import Decision, decides, mode
from openmythos_kernels.serve.request import Handle, checked, sample_each
from openmythos_kernels.serve.rows import Rows, Tokens
from openmythos_kernels.serve.sequences import Sequences
from openmythos_kernels.serve.watching import watch
from openmythos_kernels.serve.weights import Weights


@dataclass
class _Active:
    """A request in a slot.

    Attributes:
        known: the prompt and the new tokens. The first `fed` of them have entered the loop.
        rows: where those that are in the loop are in the engine's rows; they are the last fed ones.
        decision: the request's exit on them.
    """

    handle: Handle
    slot: int
    claim: int
    known: list[int]
    fed: int = 0
    rows: list[int] = field(default_factory=list)
    decision: Decision | None = None

    @property
    def in_prompt(self) -> bool:
        """Whether the tokens in the loop, or the next to enter it, are the prompt's."""
        return len(self.known) == len(self.handle.request.prompt)


class Engine:
    """Serves a model of `openmythos_kernels.accelerate` to many requests at once.

    One `step` is a tick: the looped block runs once on every token in the loop, each at its own loop. Tokens that halt
    leave through coda, head and sampling, and the next tokens come in through the prelude. The block's weights are read
    once a tick, whatever the loops.

    What a request gets does not depend on the other requests. On a CPU it is the same to the bit, alone or not.

    Args:
        model: an accelerated OpenMythos without dropout. Its weights must not change while requests are under way.
        slots: requests under way at most; others wait in the order of their arrival.
        chunk: tokens of prompts in a tick at most; the rest of a prompt comes in later ticks.
        budget: bytes of latents for the requests under way, None for no limit. A request waits until what it may need
            at most fits. The tables, 16 bytes for each slot and token of the longest request, come on top.
        keep: latents that a token keeps in a looped layer, None for one of every loop that it ran; see
            `openmythos.ragged.RaggedCache`. With a number, results depend on `chunk`; so do those of exits that read
            the coda.

    Raises:
        ValueError: naming the argument; for `model` with the part that the ops cannot stand in for.
    """

    def __init__(self, model, slots: int = 16, *, chunk: int = 64, budget: int | None = None, keep: int | None = None):
        self.model = model
        self.slots, self.chunk = checked_integer("slots", slots, 1), checked_integer("chunk", chunk, 1)
        self.keep = None if keep is None else checked_integer("keep", keep, 1)
        self._limit = None if budget is None else checked_integer("budget", budget, 1)
        self._lock = threading.RLock()  # handles may be read on several threads, and each drives the engine
        self._waiting: deque[tuple[Handle, int]] = deque()
        self._active: list[_Active] = []  # in the order of admission
        self._start()

    def _start(self) -> None:
        """Everything anew, for the model as it is now."""
        self._weights = Weights(self.model)
        self._sequences = Sequences(self._weights, self.slots, self.keep)
        self._budget = Budget(self._weights, self._limit, self.keep)
        # A slot that decodes has one token in the loop.
        self._rows = Rows.free(self.slots + self.chunk, self._weights)
        self._free_rows = list(reversed(range(self.slots + self.chunk)))
        self._free_slots = list(reversed(range(self.slots)))

    def submit(
        self,
        prompt: Tensor | Sequence[int],
        max_new_tokens: int = 64,
        *,
        n_loops: int | None = None,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        eos: int | Sequence[int] | None = None,
        seed: int | None = None,
        exit: Exit = None,
    ) -> Handle:
        """Queues a request.

        Args:
            prompt: token ids, (n,) with n >= 1.
            max_new_tokens, temperature, top_k, top_p: as of `openmythos.generate.stream`.
            n_loops: loops of a token at most; None means the configured number.
            eos: a token that ends the request, or several.
            seed: of the request's own generator; None draws one.
            exit: who decides that a token halts; None: the model's configured halting. See `openmythos.exits`: a rule,
                its name, or a function (t, states before loop t (N, D), states after it (N, D)) -> bool (N,). It must
                judge each row by itself.

        Raises:
            ValueError: naming the argument, what came and what was expected; for a request that could never run, too.
        """
        with self._lock:
            if not (self._active or self._waiting):
                self._start()
            request = checked(
                self.model.cfg,
                self._weights.device,
                prompt,
                max_new_tokens,
                temperature,
                top_k,
                top_p,
                eos,
                seed,
                n_loops,
                exit,
            )
            claim = self._budget.claim_of(request)
            handle = Handle(self, request)
            if request.max_new_tokens:
                self._waiting.append((handle, claim))
            else:
                handle.finished = "length"
            return handle

    def generate(self, prompts: Prompts, max_new_tokens: int = 64, **options) -> list[Tensor]:
        """Prompts with their continuations, up to and including an eos: one 1-D tensor each.

        Args:
            prompts: (B, T) int64, or a list of prompts of any lengths.
            options: as of `submit`, for each prompt; but the seed of prompt b is `seed + b`.

        Raises:
            ValueError: as `submit`; nothing is generated then.
        """
        rows, seed, handles = prompt_rows(prompts), options.pop("seed", None), []
        try:
            for b, row in enumerate(rows):
                own = seed if seed is None else seed + b
                handles.append(self.submit(row, max_new_tokens, seed=own, **options))
        except ValueError:
            for handle in handles:
                handle.cancel()
            raise
        return [torch.cat((row.to(torch.int64).cpu(), handle.result())) for row, handle in zip(rows, handles)]

    def cancel(self, handle: Handle) -> None:
        """See `Handle.cancel`."""
        with self._lock:
            if not handle.finished:
                self._waiting = deque(entry for entry in self._waiting if entry[0] is not handle)
                for active in [active for active in self._active if active.handle is handle]:
                    self._release(active)
                handle.finished = "cancelled"

    @torch.no_grad()
    def step(self) -> bool:
        """One tick. Returns whether there is more to do.

        An error in it ends every request that is under way, since nobody knows how far the tick came.
        """
        with self._lock:
            try:
                self._admit()
                self._enter()
                self._loop()
                self._leave()
            except BaseException as error:
                for active in list(self._active):
                    self._fail(active, error)
                raise
            return bool(self._active or self._waiting)

    @property
    def active(self) -> int:
        """Requests that have a slot."""
        return len(self._active)

    def nbytes(self) -> int:
        """Bytes that the caches have allocated."""
        return self._sequences.nbytes()

    def _admit(self) -> None:
        """Gives free slots to waiting requests, in order."""
        while self._waiting and self._free_slots and self._budget.fits(self._waiting[0][1]):
            handle, claim = self._waiting.popleft()
            self._budget.claimed += claim
            self._active.append(_Active(handle, self._free_slots.pop(), claim, list(handle.request.prompt)))

    def _enter(self) -> None:
        """Takes the next tokens through the prelude, into the loop."""
        entering = [(active, n) for active, n in self._next() if n]
        if not entering:
            return
        weights, sequences = self._weights, self._sequences
        decoding = [active for active, _ in entering if not active.in_prompt]
        if decoding:
            limits = [active.handle.request.n_loops for active in decoding]
            sequences.append([active.slot for active in decoding], 1, limits)
        ids, slots, places, limits = [], [], [], []
        for active, n in entering:
            limit = active.handle.request.n_loops
            if active.in_prompt:
                sequences.append([active.slot], n, [limit])
            ids += active.known[active.fed : active.fed + n]
            slots += [active.slot] * n
            places += list(range(active.fed, active.fed + n))
            limits += [limit] * n
            active.rows = [self._free_rows.pop() for _ in range(n)]
            active.fed += n
        entered = [row for active, _ in entering for row in active.rows]
        at, new, sequence, position, limit = torch.tensor((entered, ids, slots, places, limits), device=weights.device)
        tokens = Tokens(sequence, position)
        e = sequences.enter(new, tokens)
        self._rows.start(at, e, sequences.initial(e), limit, weights.angles[position], tokens)
        for active, _ in entering:
            rule = active.handle.request.exit
            if rule is not None and decides(rule):
                active.decision = Decision(rule, self._rows, torch.tensor(active.rows, device=weights.device))

    def _next(self):
        """Yields (active, how many of its tokens enter the loop now)."""
        room = self.chunk - sum(len(active.rows) for active in self._active if active.in_prompt)
        for active in self._active:
            left = len(active.known) - active.fed
            if active.rows or not active.in_prompt:
                yield active, 0 if active.rows else left
                continue
            # The keys of a chunk's tokens depend on its size where they keep fewer latents than loops, and their exits
            # do where these read the coda: it must not depend on the room then.
            rule = active.handle.request.exit
            fixed = self.keep or (rule is not None and rule.predicts and rule.coda)
            n = min(left, self.chunk if fixed else room)
            n = n if n <= room else 0
            room = room - n if n else 0
            yield active, n

    def _loop(self) -> None:
        """One loop of every token that is in the loop and has not halted."""
        inside = [active for active in self._active if active.rows]
        groups: dict[tuple[bool, bool], list[_Active]] = {}
        for active in inside:
            groups.setdefault(mode(active.handle.request.exit, self._weights.halting), []).append(active)
        deepest = max((active.handle.request.n_loops for active in inside), default=0)
        deciding = [(active, active.decision) for active in inside if active.decision is not None]
        rows = self._rows
        before = rows.h.clone() if deciding else rows.h
        for (act, freeze), chosen in groups.items():
            limit = rows.limit
            if len(groups) > 1:
                at = torch.tensor(list(chain.from_iterable(active.rows for active in chosen)), device=limit.device)
                limit = torch.zeros_like(limit).index_copy_(0, at, limit[at])
            self._sequences.loop(rows, limit, deepest, act=act, freeze=freeze)
        if debug.on:
            for active in inside:
                try:
                    debug.check_states("in the loop", rows.h[active.rows])
                except FloatingPointError as error:
                    self._fail(active, error)
        for active, decision in deciding:
            if active.handle.finished:
                continue
            try:
                decision.ask(rows, before, self._sequences)
            except Exception as error:  # the rule may be the user's
                self._fail(active, error)

    def _leave(self) -> None:
        """Takes tokens that are done through the coda, and samples what follows the newest."""
        rows = self._rows
        ended, running = (rows.loop >= rows.limit).tolist(), rows.running.tolist()
        done = []
        for active in self._active:
            if not active.rows:
                continue
            freezes = mode(active.handle.request.exit, self._weights.halting)[1]
            if all(ended[row] or (freezes and not running[row]) for row in active.rows):
                done.append(active)
        if not done:
            return
        at = torch.tensor(list(chain.from_iterable(a.rows for a in done)), device=self._weights.device)
        x = self._sequences.leave(rows.h_out[at], rows.tokens(at))
        rows.limit[at] = 0
        loop = rows.loop.tolist()
        sampling, ends, end = [], [], 0
        for active in done:
            loops, end = [loop[row] for row in active.rows], end + len(active.rows)
            active.handle.depths += loops
            watch(self._weights, active.handle.request.exit, loops, rows.ponder[active.rows])
            self._sequences.settle(active.slot, active.fed - len(loops), loops, active.handle.request.n_loops)
            self._free_rows += reversed(active.rows)
            active.rows, active.decision = [], None
            if active.fed == len(active.known):
                sampling.append(active)
                ends.append(end - 1)
        if sampling:
            logits = self._sequences.logits(x[ends])
            for active, token in zip(sampling, sample_each([a.handle.request for a in sampling], logits)):
                if isinstance(token, Exception):
                    self._fail(active, token)
                else:
                    self._take(active, token)

    def _take(self, active: _Active, token: int) -> None:
        """A request's next token."""
        handle = active.handle
        active.known.append(token)
        handle.tokens.append(token)
        ended, full = token in handle.request.ends, len(handle.tokens) == handle.request.max_new_tokens
        if ended or full:
            self._release(active)
            handle.finished = "eos" if ended else "length"

    def _fail(self, active: _Active, error: BaseException) -> None:
        self._release(active)
        active.handle.error = error
        active.handle.finished = "failed"

    def _release(self, active: _Active) -> None:
        """Empties a slot."""
        if active.rows:
            self._rows.limit[active.rows] = 0
            self._free_rows += reversed(active.rows)
        self._sequences.truncate(active.slot, 0)
        self._budget.claimed -= active.claim
        self._active.remove(active)
        self._free_slots.append(active.slot)
