"""Small faults in what follows depth: frozen keys, the ragged cache, packed rows and exits."""

from tests.mutations.mutation import Mutation

_FROZEN = "openmythos/frozen.py"
_RAGGED = "openmythos/ragged.py"
_EXITS = "openmythos/exits.py"
_PACKED = "openmythos_kernels/nn/packed.py"
_ROWS = "openmythos_kernels/nn/paths/packed_rows.py"
_RECOMPUTE = "openmythos_kernels/nn/paths/mla_packed_recompute.py"
_WALK = "openmythos_kernels/nn/packed_walk.py"
_KEPT = "openmythos_kernels/nn/paths/mla_packed.py"
_TESTS = "tests/openmythos_kernels/nn/paths/test_packed_rows.py"

MUTATIONS = [
    Mutation(
        "frozen keys: a halted position makes new keys",
        _FROZEN,
        "torch.where(_like(self._running, x), x, before[name])",
        "x",
        "tests/openmythos/test_recurrence.py -k freeze_by_definition",
    ),
    Mutation(
        "frozen keys: the cache keeps the latents of the first loop alone",
        _FROZEN,
        "(first + cache.slot(t))[runs]",
        "(first + cache.slot(0))[runs]",
        "tests/openmythos/test_exits.py -k cache",
    ),
    Mutation(
        "frozen keys: the loop in which a position halts leaves no latent",
        _FROZEN,
        "runs = last >= t",
        "runs = last > t",
        "tests/openmythos/test_exits.py -k cache",
    ),
    Mutation(
        "frozen keys: a shorter sequence's new keys come behind the longest one's",
        _FROZEN,
        "places = torch.tensor(held, device=new.device)[:, None]",
        "places = torch.tensor([max(held)] * len(held), device=new.device)[:, None]",
        f"{_TESTS} -k different_length",
    ),
    Mutation(
        "ragged cache: a loop reads a halted token's row past its last",
        _RAGGED,
        "at = last.clamp(max=t)",
        "at = torch.full_like(last, t)",
        "tests/openmythos/test_ragged.py",
    ),
    Mutation(
        "ragged cache: every loop reads the deepest latent",
        _RAGGED,
        "at = last.clamp(max=t)",
        "at = last",
        "tests/openmythos/test_ragged.py",
    ),
    Mutation(
        "ragged cache: a slot of fewer latents is read as if all were kept",
        _RAGGED,
        "(at % self.keep if self.keep else at)",
        "at",
        "tests/openmythos/test_ragged.py",
    ),
    Mutation(
        "ragged cache: two sequences share a page",
        _RAGGED,
        "if not self._pages[b] or",
        "if self._count and not self._pages[b]:\n"
        "            self._pages[b].append(0)\n"
        "            self._used[b] = max(self._used)\n"
        "        if not self._pages[b] or",
        "tests/openmythos/test_ragged.py",
    ),
    Mutation(
        "ragged cache: settled tokens give back no rows",
        _RAGGED,
        "self._used[b] -= given - ran",
        "pass",
        "tests/openmythos/test_ragged.py",
    ),
    Mutation(
        "ragged cache: pages of a truncated sequence are lost",
        _RAGGED,
        "self._free += self._pages[b][kept:]",
        "pass",
        "tests/openmythos/test_ragged.py",
    ),
    Mutation(
        "ragged cache: a truncated sequence goes on behind its dropped tokens",
        _RAGGED,
        "self._used[b] = row % self._page + given",
        "pass",
        "tests/openmythos/test_ragged.py",
    ),
    Mutation(
        "packed rows: tokens of earlier calls keep the latents of the first loop",
        _PACKED,
        "exists & (cache.last[:, :longest] >= self._t)",
        "exists & (cache.last[:, :longest] > longest)",
        f"{_TESTS} -k chunks",
    ),
    Mutation(
        "packed rows: tokens of earlier calls stay at the loop before their last",
        _PACKED,
        "cache.last[:, :longest] >= self._t",
        "cache.last[:, :longest] > self._t",
        f"{_TESTS} -k chunks",
    ),
    Mutation(
        "packed rows: keys of a row land in the neighbour sequence",
        _PACKED,
        "self._sequence * self.keys + self.position",
        "(self._sequence + 1) % self.batch * self.keys + self.position",
        f"{_TESTS} -k prompts",
    ),
    Mutation(
        "packed rows: rows of shorter sequences have the longest one's positions",
        _PACKED,
        "self._held[self._sequence] + self.place",
        "self._held.max() + self.place",
        f"{_TESTS} -k different_length",
    ),
    Mutation(
        "packed rows: the cache takes the rows of one loop for those of the next",
        _PACKED,
        "first[place] + cache.slot(t)",
        "first[place] + cache.slot(max(t - 1, 0))",
        f"{_TESTS} -k chunks",
    ),
    Mutation(
        "packed rows: halted positions lose their place in the result",
        _ROWS,
        "self.collected.add(self.packs.place[rows],",
        "self.collected.add(rows,",
        f"{_TESTS} -k prompts",
    ),
    Mutation(
        "packed rows: the last running position leaves with those that halt",
        _ROWS,
        "kept = running.nonzero()[:, 0]\n",
        "kept = running.nonzero()[:-1, 0]\n        running = torch.zeros_like(running).index_fill(0, kept, True)\n",
        f"{_TESTS} -k prompts",
    ),
    Mutation(
        "packed rows: a mask that is not causal is taken for one",
        _ROWS,
        "mask = recognised(mask, tokens, held[0] + tokens)",
        "mask = CausalMask(held[0])",
        f"{_TESTS} -k masks",
    ),
    Mutation(
        "packed rows: predictions through the coda forget the halted positions",
        _ROWS,
        "if self.whole is None:",
        "if True:",
        f"{_TESTS} -k prompts",
    ),
    Mutation(
        "packed walk: gradients of shared keys are dropped between loops",
        _WALK,
        "return theirs + mine if graph else theirs.add_(mine)",
        "return mine",
        f"{_TESTS} -k every_gradient",
    ),
    Mutation(
        "packed walk: gradients of shared keys count twice",
        _WALK,
        "total.index_fill_(0, at, 0.0) for total in sums]",
        "total for total in sums]",
        f"{_TESTS} -k every_gradient",
    ),
    Mutation(
        "packed walk: the backward reads the keys of the last loop in every loop",
        _WALK,
        "if self._loop != t + 1 or not self._whole:",
        "if not self._whole:",
        f"{_TESTS} -k second_backward",
    ),
    Mutation(
        "packed walk: keys that a later loop replaced stand on the way back",
        _WALK,
        "mine = owner[at] == t",
        "mine = owner[at] >= 0",
        f"{_TESTS} -k every_gradient",
    ),
    Mutation(
        "packed recompute: keys of loops without gradients give kv_up none",
        _RECOMPUTE,
        "dup = dup + more",
        "pass",
        f"{_TESTS} -k every_gradient",
    ),
    Mutation(
        "packed recompute: loops without gradients hand their keys on to another path",
        _RECOMPUTE,
        "per_head.dtypes(call, backend, keys.graded)",
        "per_head.dtypes(call, backend)",
        f"{_TESTS} -k 16_bits",
    ),
    Mutation(
        "packed walk: the graph holds what holds the graph",
        _KEPT,
        "ctx.buffers, ctx.rows, ctx.places = walk.buffers,",
        "ctx.walk, ctx.buffers, ctx.rows, ctx.places = walk, walk.buffers,",
        "tests/openmythos_kernels/test_graphs_are_freed.py -k freeze",
    ),
    Mutation(
        "packed attention: the loops share one graph of the keys, expanded once",
        _KEPT,
        "if keys.graded:",
        "if False:",
        f"{_TESTS} -k hooks",
    ),
    Mutation(
        "packed attention: keys of loops without gradients give kv_up none",
        _KEPT,
        "if walk.frozen:",
        "if False:",
        f"{_TESTS} -k every_gradient",
    ),
    Mutation(
        "packed attention: a loop's gradients are those of the keys that it made alone",
        _KEPT,
        "rows, others = buffers.leave(at, dseen, later, own)",
        "rows, others = buffers.leave(at, dseen, (None, None), own)",
        f"{_TESTS} -k every_gradient",
    ),
    Mutation(
        "debug: the loop goes on from states that are not finite",
        "openmythos/loop.py",
        'debug.check_states(f"after loop {t}", h)',
        "pass",
        "tests/openmythos_kernels/test_debug.py -k named",
    ),
    Mutation(
        "debug: what the loop ops leave is not looked at",
        "openmythos_kernels/nn/recurrence.py",
        "if debug.on:",
        "if False:",
        "tests/openmythos_kernels/test_debug.py -k decoded",
    ),
    Mutation(
        "debug: a request that is not finite ends at its sampling",
        "openmythos_kernels/serve/engine.py",
        "if debug.on:",
        "if False:",
        "tests/openmythos_kernels/test_debug.py -k alone",
    ),
    Mutation(
        "exits: a position that meets its limit exactly halts",
        _EXITS,
        "halts = score < self.limit",
        "halts = score <= self.limit",
        "tests/openmythos/test_exits.py",
    ),
    Mutation(
        "exits: the minimum of loops is one too few",
        _EXITS,
        "return halts & torch.as_tensor(ran >= self.minimum",
        "return halts & torch.as_tensor(ran + 1 >= self.minimum",
        "tests/openmythos/test_exits.py",
    ),
    Mutation(
        "exits: a halted position may run again",
        _EXITS,
        "state.running & ~halts",
        "~halts",
        "tests/openmythos/test_exits.py",
    ),
]
