"""The ops over rows: the formulas equal the reference's block, and no bit of a row depends on its company."""

import copy

import pytest
import torch

from openmythos.attention import CausalMask
from openmythos_kernels.ops.layer import block_rows, formula, linear_rows, loop_rows
from tests.kit.rows import KVCache, Tokens, block, freqs
from tests.kit.threads import for_each_number

B, T, LOOPS = 3, 7, 5


def by_formula(*args, keep, eps, threshold, spend_remainder, residual, freeze, act, loops):
    return formula.loop_rows(*args, keep, eps, threshold, spend_remainder, residual, freeze, act, loops)


FUNCTIONS = {"formula": by_formula, "op": loop_rows}
VARIANTS = {
    "freeze": dict(halting="freeze"),
    "freeze, experts": dict(halting="freeze", core_ffn="moe", n_experts_per_tok=2),
    "freeze, two blocks": dict(halting="freeze", core_layers=2),
    "freeze, the rest at last": dict(halting="freeze", act_remainder="last"),
    "freeze, residual, no LoRA": dict(halting="freeze", injection="residual", lora_rank=0),
    "freeze, past the trained depth": dict(halting="freeze", max_loop_iters=3),
    "evolve": dict(halting="evolve", core_ffn="moe", n_experts_per_tok=2),
    "evolve, the rest at last": dict(halting="evolve", act_remainder="last"),
    "off": dict(halting="off"),
}


def inputs(recurrent, seed=1):
    torch.manual_seed(seed)
    shape = B, T, recurrent.cfg.dim
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def token_by_token(recurrent, h, e):
    """The reference with a cache: out and ponder of each token, (B, T, D) and (B, T)."""
    cache, phasors, act = KVCache(T), freqs(recurrent, T), recurrent.cfg.halting != "off"
    found = []
    for t in range(T):
        at = slice(t, t + 1)
        out = recurrent(h[:, at], e[:, at], phasors[at], CausalMask(t, 1), LOOPS, cache, act)
        found.append(out if act else (out, out.new_zeros(B, 1)))
    out, ponder = zip(*found)
    return torch.cat(out, 1), torch.cat(ponder, 1)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_tokens_one_after_the_other_equal_the_reference_with_a_cache(function, fields):
    recurrent = block(**fields)
    h, e = inputs(recurrent)
    out, ponder = token_by_token(recurrent, h, e)
    tokens, sequence = Tokens(function, recurrent, B, T, LOOPS), torch.arange(B)
    depths = set()
    for t in range(T):
        state = tokens.start(h[:, t], e[:, t], sequence, torch.full((B,), t), LOOPS)
        tokens.run(state, LOOPS)
        torch.testing.assert_close(state["h_out"], out[:, t], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state["ponder"], ponder[:, t], rtol=1e-12, atol=1e-12)
        assert torch.equal(tokens.last[:, t].long() + 1, state["loop"])
        depths |= set(state["loop"].tolist())
    assert len(depths) > 2 if recurrent.cfg.halting == "freeze" else depths == {LOOPS}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("chunk", [1, 3, T])
def test_a_prompt_in_chunks_equals_the_reference_without_a_cache(function, chunk):
    """All tokens of a chunk are rows of one call, and run loop by loop."""
    recurrent = block(halting="freeze", core_ffn="moe", n_experts_per_tok=2)
    h, e = inputs(recurrent)
    out, ponder = recurrent(h, e, freqs(recurrent, T), CausalMask(0, T), LOOPS, None, True)
    tokens = Tokens(function, recurrent, B, T, LOOPS)
    for begin in range(0, T, chunk):
        sequence, position = (
            x.flatten()
            for x in torch.meshgrid(torch.arange(B), torch.arange(begin, min(T, begin + chunk)), indexing="ij")
        )
        state = tokens.start(h[sequence, position], e[sequence, position], sequence, position, LOOPS)
        while ((state["loop"] < LOOPS) & state["running"]).any():
            tokens.run(state, 1)
        torch.testing.assert_close(state["h_out"], out[sequence, position], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state["ponder"], ponder[sequence, position], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("keep", [1, 2, 3, LOOPS])
def test_a_loop_reads_what_was_last_written_to_its_slot(function, keep):
    recurrent = block(halting="freeze")
    h, e = inputs(recurrent)
    tokens, sequence = Tokens(function, recurrent, B, T, LOOPS, keep), torch.arange(B)
    whole = Tokens(function, recurrent, B, T, LOOPS)
    for t in range(T):
        states = [x.start(h[:, t], e[:, t], sequence, torch.full((B,), t), LOOPS) for x in (tokens, whole)]
        for x, state in zip((tokens, whole), states):
            x.run(state, LOOPS)
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
        for n in range(B):  # in the whole table, the later latents overwrite those of their slots by hand
            first, ran = int(whole.first[n, t]), int(whole.last[n, t])
            for pool in (x for pools in whole.pools for x in pools):
                newest = [x + (ran - x) // keep * keep for x in range(ran + 1)]
                pool[first : first + ran + 1] = pool[[first + x for x in newest]]


@pytest.mark.parametrize("threshold, loops", [(1e-9, 1), (99.0, LOOPS)], ids=["halts at loop 0", "nothing halts"])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_where_rows_end(function, threshold, loops):
    recurrent = block(halting="freeze", act_threshold=threshold)
    h, e = inputs(recurrent)
    tokens = Tokens(function, recurrent, B, T, LOOPS)
    state = tokens.start(h[:, 0], e[:, 0], torch.arange(B), torch.zeros(B, dtype=torch.int64), LOOPS)
    tokens.run(state, LOOPS)
    assert state["loop"].tolist() == [loops] * B and state["running"].tolist() == [loops == LOOPS] * B
    before = copy.deepcopy((state, tokens.last, tokens.pools))
    load = tokens.run(state, LOOPS)  # none has loops left: nothing changes
    assert not load.any()
    torch.testing.assert_close((state, tokens.last, tokens.pools), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_threshold_met_exactly_halts(function):
    """p = 1/2 in every loop: cumulative_p is exactly 1/2, 1."""
    recurrent = block(halting="freeze", act_threshold=1.0)
    recurrent.act.halt.weight.zero_()
    recurrent.act.halt.bias.zero_()
    h, e = inputs(recurrent)
    tokens = Tokens(function, recurrent, B, T, LOOPS)
    state = tokens.start(h[:, 0], e[:, 0], torch.arange(B), torch.zeros(B, dtype=torch.int64), LOOPS)
    tokens.run(state, LOOPS)
    assert state["loop"].tolist() == [2] * B and state["cumulative_p"].tolist() == [1.0] * B


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_no_rows_and_rows_that_are_not_numbers(function):
    recurrent = block(halting="freeze", core_ffn="moe", n_experts_per_tok=2)
    h, e = inputs(recurrent)
    tokens = Tokens(function, recurrent, B, T, LOOPS)
    none = torch.zeros(0, dtype=torch.int64)
    assert not tokens.run(tokens.start(h[:0, 0], e[:0, 0], none, none, LOOPS), LOOPS).any()
    alone = Tokens(function, recurrent, B, T, LOOPS)
    position = torch.zeros(B, dtype=torch.int64)
    clean = alone.start(h[:, 0], e[:, 0], torch.arange(B), position, LOOPS)
    alone.run(clean, LOOPS)
    h[1, 0, 3] = float("nan")
    state = tokens.start(h[:, 0], e[:, 0], torch.arange(B), position, LOOPS)
    tokens.run(state, LOOPS)
    assert not state["running"][1] and state["loop"][1] == 1
    for n in (0, 2):
        torch.testing.assert_close(state["h_out"][n], clean["h_out"][n], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_without_halting_the_caller_decides_who_runs(function):
    recurrent = block(halting="freeze")
    h, e = inputs(recurrent)
    tokens = Tokens(function, recurrent, B, T, LOOPS)
    state = tokens.start(h[:, 0], e[:, 0], torch.arange(B), torch.zeros(B, dtype=torch.int64), LOOPS)
    state["running"][1] = False
    kept = state["h"][1].clone()
    tokens.run(state, 2, act=False)
    assert state["loop"].tolist() == [2, 0, 2] and state["running"].tolist() == [True, False, True]
    assert torch.equal(state["h"][1], kept) and not state["h_out"][1].any()
    assert torch.equal(state["h"][0], state["h_out"][0]) and not state["ponder"].any()


DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# dim, heads, latent: whole vectors and parts of one, in every sum.
WIDE = dict(
    dim=136, n_heads=3, kv_lora_rank=40, q_lora_rank=72, qk_nope_head_dim=24, qk_rope_head_dim=12, v_head_dim=20
)


def company(count, rows, generator):
    """A partition of `rows` tensors' indices into groups, in ascending order of position."""
    cuts = torch.randint(1, rows, (count,), generator=generator).unique().tolist()
    return [range(a, b) for a, b in zip([0, *cuts], [*cuts, rows])]


def scattered(N, S, C, generator):
    """Distinct tokens in ascending order of position: no row reads a later one."""
    chosen = torch.randperm(S * C, generator=generator)[:N]
    chosen = chosen[(chosen % C).sort(stable=True).indices]
    return chosen // C, chosen % C


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [2, 5, 21, 150])
def test_no_bit_of_a_row_depends_on_its_company(N, dtype):
    generator = torch.Generator().manual_seed(N)
    recurrent = block(
        dtype=dtype, halting="freeze", core_ffn="moe", n_experts=9, n_experts_per_tok=2, expert_dim=72, **WIDE
    )
    S, C, depth = 5, 300, 4
    sequence, position = scattered(N, S, C, generator)
    h, e = (torch.randn(N, recurrent.cfg.dim, generator=generator).to(dtype) for _ in range(2))
    tokens = Tokens(loop_rows, recurrent, S, C, depth)
    tokens.last.copy_(torch.randint(0, depth, (S, C), generator=generator))
    for pool in (x for pools in tokens.pools for x in pools):
        pool.copy_(torch.randn(pool.shape, generator=generator))
    loop = torch.randint(0, depth - 1, (N,), generator=generator)
    state = tokens.start(h, e, sequence, position, depth)
    state["loop"].copy_(loop)
    tokens.last[sequence, position] = loop.int()

    def run(groups):
        here = copy.copy(tokens)
        here.last, here.pools = tokens.last.clone(), copy.deepcopy(tokens.pools)
        results = {name: value.clone() for name, value in state.items()}
        for group in groups:
            rows = torch.tensor(list(group))
            part = {name: value[rows] for name, value in results.items()}
            here.run(part, 1)
            for name, value in part.items():
                results[name][rows] = value
        return results | {f"pool {i} {j}": x for i, pools in enumerate(here.pools) for j, x in enumerate(pools)}

    groups = [[range(N)], [range(n, n + 1) for n in range(N)], company(4, N, generator)]
    (expected, *_), *others = (for_each_number((1, 2, 3), lambda g=g: run(g)) for g in groups)
    for found in (x for results in others for x in results):
        for name, value in expected.items():
            assert torch.equal(value, found[name]), name
    assert not torch.equal(expected["h"], state["h"])


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_of_a_linear_row_depends_on_its_company(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(37, 209).to(dtype), torch.randn(301, 209).to(dtype)
    whole, *others = for_each_number((1, 2, 3), lambda: linear_rows(x, weight))
    alone = torch.cat([linear_rows(x[n : n + 1], weight) for n in range(len(x))])
    assert all(torch.equal(whole, other) for other in (*others, alone))


BAD = {
    "sequence": lambda s: s["sequence"].fill_(B),
    "position": lambda s: s["position"].fill_(-1),
    "loop": lambda s: s["loop"].fill_(-1),
    "limit": lambda s: s["limit"].fill_(LOOPS + 1),
}


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("name", [*BAD, "first, last"])
def test_places_outside_of_the_table_or_the_pool_are_named(name):
    recurrent = block(halting="freeze")
    h, e = inputs(recurrent)
    tokens = Tokens(loop_rows, recurrent, B, T, LOOPS)
    state = tokens.start(h[:, 0], e[:, 0], torch.arange(B), torch.zeros(B, dtype=torch.int64), LOOPS)
    if name in BAD:
        BAD[name](state)
    else:
        tokens.first[1, 0] = B * T * LOOPS - LOOPS + 1  # its last loop would leave the pool
    before = copy.deepcopy((state, tokens.last))
    with pytest.raises(ValueError, match=name):
        tokens.run(state, LOOPS)
    torch.testing.assert_close((state, tokens.last), before, rtol=0, atol=0)
    if name != "limit":
        x, place = h[:, 0].contiguous(), (state["sequence"], state["position"], state["loop"])
        if name == "first, last":
            tokens.first[1, 0] = B * T * LOOPS
        with pytest.raises(ValueError, match=name):
            block_rows(
                x,
                state["freqs"],
                *place,
                tokens.first,
                tokens.last,
                tokens.pools[0][0],
                tokens.pools[1][0],
                tokens.blocks,
            )
