"""Small faults in serving: slots, memory and speculation."""

from tests.mutations.mutation import Mutation

_ENGINE = "openmythos_kernels/serve/engine.py"
_REQUEST = "openmythos_kernels/serve/request.py"
_SEQUENCES = "openmythos_kernels/serve/sequences.py"
_SPECULATION = "openmythos_kernels/serve/speculation.py"
_TESTS = "tests/openmythos_kernels/serve"

MUTATIONS = [
    Mutation(
        "engine: a slot reads its neighbour's cache",
        _ENGINE,
        "slots += [active.slot] * n",
        "slots += [(active.slot + 1) % self.slots] * n",
        f"{_TESTS}/test_engine.py -k same_bits",
    ),
    Mutation(
        "engine: cancelled tokens go on in the loop",
        _ENGINE,
        "            self._rows.limit[active.rows] = 0\n",
        "",
        f"{_TESTS}/test_engine.py -k cancelled_prompt",
    ),
    Mutation(
        "engine: a token is lost at a cancellation",
        _ENGINE,
        '                handle.finished = "cancelled"\n',
        '                handle.finished = "cancelled"\n'
        "                [active.handle.tokens.pop() for active in self._active if active.handle.tokens]\n",
        f"{_TESTS}/test_engine.py -k cancellation",
    ),
    Mutation(
        "engine: a slot is not truncated",
        _ENGINE,
        "self._sequences.truncate(active.slot, 0)",
        "pass",
        f"{_TESTS}/test_engine.py -k used_again",
    ),
    Mutation(
        "engine: a chunk of a prompt leaves with its first halted token",
        _ENGINE,
        "if all(ended",
        "if any(ended",
        f"{_TESTS}/test_engine.py -k those_of_generate",
    ),
    Mutation(
        "engine: chunks depend on what else is in the loop although a token keeps few latents",
        _ENGINE,
        "fixed = self.keep or",
        "fixed =",
        f"{_TESTS}/test_engine.py -k few_latents",
    ),
    Mutation(
        "engine: ACT decides although the request has an exit of its own",
        "openmythos_kernels/serve/deciding.py",
        "return isinstance(rule, ACT), True",
        "return True, True",
        f"{_TESTS}/test_engine.py -k exit_of_the_users",
    ),
    Mutation(
        "engine: an exit judges a token by what it remembers of another",
        "openmythos_kernels/serve/deciding.py",
        "tuple(x[~halts] for x in memory)",
        "tuple(x[: int((~halts).sum())] for x in memory)",
        f"{_TESTS}/test_engine.py -k exit_rule",
    ),
    Mutation(
        "engine: what does not fit into memory is admitted",
        _ENGINE,
        " and self._budget.fits(self._waiting[0][1])",
        "",
        f"{_TESTS}/test_engine.py -k bounded",
    ),
    Mutation(
        "engine: requests share a generator",
        _REQUEST,
        "generator = torch.Generator(device)",
        "generator = torch.default_generator",
        f"{_TESTS}/test_engine.py -k generators or same_bits",
    ),
    Mutation(
        "engine: a halted token keeps the room of all loops",
        _SEQUENCES,
        "if min(room) == self._room(limit):",
        "if True:",
        f"{_TESTS}/test_engine.py -k keeps_the_rows",
    ),
    Mutation(
        "engine: a prompt's tokens lose their latents when they move together",
        _SEQUENCES,
        "cache.put(layer, new, **values)",
        "pass",
        f"{_TESTS}/test_engine.py -k same_bits",
    ),
    Mutation(
        "speculation: a draft's coda latent is kept",
        _SPECULATION,
        "        new = self._accepted(drafts[1:], guessed, self._logits(rows.h_out, rows))\n",
        "        pool = self.sequences.outer.pools['coda_0']['latent']\n        kept = pool.clone()\n"
        "        new = self._accepted(drafts[1:], guessed, self._logits(rows.h_out, rows))\n        pool.copy_(kept)\n",
        f"{_TESTS}/test_speculation.py -k caches_and_logits",
    ),
    Mutation(
        "speculation: rejected drafts stay in the caches",
        _SPECULATION,
        "        self.held = start + count\n        self.sequences.truncate(0, self.held)\n",
        "        self.held = start + count\n",
        f"{_TESTS}/test_speculation.py -k greedy",
    ),
    Mutation(
        "speculation: every draft is accepted",
        _SPECULATION,
        "* q[draft] < p[draft]:",
        "* q[draft] < 2:",
        f"{_TESTS}/test_speculation.py -k distribution",
    ),
    Mutation(
        "speculation: a rejected draft is replaced by a sample of the model's distribution",
        _SPECULATION,
        "rest if rest.any() else p",
        "p",
        f"{_TESTS}/test_speculation.py -k right_distribution",
    ),
    Mutation(
        "speculation: verification begins again at loop 0",
        _SPECULATION,
        "        self._loop(rows, self.limit - self.d)\n",
        "        rows.loop.zero_()\n        self._loop(rows, self.limit)\n",
        f"{_TESTS}/test_speculation.py -k greedy",
    ),
    Mutation(
        "engine: a request draws from its neighbour's distribution",
        _REQUEST,
        "for i, row in zip(places, distribution(mine, temperature, top_k, top_p)):",
        "for i, row in zip(places, distribution(mine.flip(0), temperature, top_k, top_p)):",
        f"{_TESTS}/test_engine.py -k same_bits",
    ),
    Mutation(
        "engine: a request without numbers ends the others",
        _REQUEST,
        "        if not nan:\n",
        "        if True:\n",
        f"{_TESTS}/test_engine.py -k without_numbers",
    ),
    Mutation(
        "ragged cache: a token settles by what the one before it was given",
        "openmythos/ragged.py",
        "            self._newest[b] = first[-1], ran[-1]\n",
        "            self._newest[b] = first[-1], 0\n",
        f"{_TESTS}/test_engine.py -k keeps_the_rows",
    ),
    Mutation(
        "depth_stats: a served token counts every loop that was computed, halted or not",
        "openmythos_kernels/serve/watching.py",
        "loops if freezes else",
        "loops if act else",
        "tests/openmythos_kernels/test_depth.py -k served",
    ),
    Mutation(
        "depth_stats: rejected drafts are counted",
        _SPECULATION,
        "watch(self.sequences.weights, None, loops, rows.ponder[:count])",
        "watch(self.sequences.weights, None, rows.loop.tolist(), rows.ponder)",
        "tests/openmythos_kernels/test_depth.py -k speculation",
    ),
    Mutation(
        "speculation: the token after the drafts counts as a draft",
        _SPECULATION,
        "self.accepted += len(new) - 1",
        "self.accepted += len(new)",
        "tests/openmythos_kernels/serve/test_speculation.py -k counts",
    ),
]
