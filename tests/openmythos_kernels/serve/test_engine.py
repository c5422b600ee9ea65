"""The engine: a request gets what it would get alone, which is what `openmythos.generate` gives."""

import random
import threading

import pytest
import torch

import openmythos
from openmythos import exits
from openmythos.config import HALTINGS
from openmythos_kernels.serve import Engine
from openmythos_kernels.serve.request import sample_each
from tests.kit.tiny import tiny_model, tokens

CONFIGS = {
    "plain": {},
    "residual, no LoRA": dict(injection="residual", lora_rank=0),
    "two dense core blocks": dict(core_layers=2, core_ffn="dense"),
    "two core blocks": dict(core_layers=2),
    "nothing around the loop": dict(prelude_layers=0, coda_layers=0),
    "two blocks around the loop": dict(prelude_layers=2, coda_layers=2),
    "remainder, zero state": dict(act_remainder="last", h0="zeros"),
    "nothing halts": dict(act_threshold=2.0),
    "everything halts at once": dict(act_threshold=1e-9),
}


def asked(seed: int, count: int = 6) -> list[dict]:
    """Requests of all kinds."""
    draw = random.Random(seed)
    return [
        dict(
            prompt=tokens(draw.randint(1, 9), seed=100 * seed + i),
            max_new_tokens=draw.randint(1, 8),
            temperature=draw.choice([0, 0.7, 1.5]),
            top_k=draw.choice([0, 5]),
            top_p=draw.choice([0.8, 1.0]),
            eos=draw.choice([None, 3, [4, 5]]),
            seed=draw.randint(0, 999),
            n_loops=draw.choice([None, 1, 3, 6]),
        )
        for i in range(count)
    ]


def play(engine: Engine, requests: list[dict], seed: int, decoys: int = 3) -> list:
    """Handles of requests that arrive at random ticks, between others that are cancelled at random ticks."""
    draw = random.Random(seed)
    coming = [(draw.randint(0, 20), i, request, draw.randint(0, 15)) for i, request in enumerate(requests)]
    coming += [(draw.randint(0, 20), -1, asked(seed + 50 + i, 1)[0], draw.randint(0, 15)) for i in range(decoys)]
    handles, leaving, tick = {}, [], 0
    while coming or engine.step():
        for entry in [entry for entry in coming if entry[0] <= tick]:
            coming.remove(entry)
            handle = engine.submit(**entry[2])
            if entry[1] < 0:
                leaving.append((tick + entry[3], handle))
            else:
                handles[entry[1]] = handle
        for entry in [entry for entry in leaving if entry[0] <= tick]:
            entry[1].cancel()
        if coming:
            engine.step()
        tick += 1
    return [handles[i] for i in range(len(requests))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("halting", HALTINGS)
@pytest.mark.parametrize("seed", range(4))
def test_a_request_gets_the_same_bits_alone_and_among_others(halting, dtype, seed, served, seen):
    model, requests = served(dtype, halting=halting), asked(seed)
    alone = []
    for request in requests:
        handle = Engine(model, slots=1).submit(**request)
        alone.append((handle.result().tolist(), handle.depths, seen(handle)))
    for slots, chunk in ((1, 3), (2, 64), (5, 4)):
        handles = play(Engine(model, slots=slots, chunk=chunk), requests, seed + slots)
        for handle, (expected, depths, logits) in zip(handles, alone, strict=True):
            assert handle.result().tolist() == expected
            assert handle.depths == depths
            for a, b in zip(seen(handle), logits, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("halting", HALTINGS)
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_tokens_are_those_of_generate(fields, halting, served):
    fields = dict(fields, halting=halting)
    reference, engine = tiny_model(**fields).double(), Engine(served(torch.float64, **fields), slots=3, chunk=4)
    prompts = [tokens(n, seed=n) for n in (5, 1, 9, 2)]
    for options in ({}, dict(n_loops=2), dict(n_loops=6), dict(n_loops=1)):
        expected = openmythos.generate(reference, prompts, 6, temperature=0, **options)
        found = engine.generate(prompts, 6, temperature=0, **options)
        assert [row.tolist() for row in found] == [row.tolist() for row in expected]
    expected = [openmythos.generate(reference, [row], 6, seed=b + 1)[0].tolist() for b, row in enumerate(prompts)]
    assert [row.tolist() for row in engine.generate(prompts, 6, seed=1)] == expected


def test_a_request_ends_at_any_eos_or_at_its_length(served):
    engine = Engine(served(halting="freeze"))
    prompt = tokens(4)
    whole = engine.submit(prompt, 9, temperature=0).result().tolist()
    end = next(i for i, token in enumerate(whole) if token not in whole[:i] and i > 2)
    for eos in (whole[end], [36 if whole[end] != 36 else 35, whole[end]]):
        handle = engine.submit(prompt, 9, temperature=0, eos=eos)
        assert handle.result().tolist() == whole[: end + 1] and handle.finished == "eos"
    handle = engine.submit(prompt, 2, temperature=0)
    assert list(handle) == whole[:2] == list(handle) and handle.finished == "length"
    handle = engine.submit(prompt, 0)
    assert handle.finished == "length" and handle.result().tolist() == []


def test_tokens_stream_one_by_one(served):
    engine = Engine(served(halting="freeze"))
    handle, other = engine.submit(tokens(3), 5, temperature=0), engine.submit(tokens(2), 5)
    for count, token in enumerate(handle, 1):
        assert len(handle.tokens) == count and handle.tokens[-1] == token
    assert count == 5 and other.tokens  # others went on meanwhile


@pytest.mark.parametrize("halting", HALTINGS)
def test_a_token_takes_a_tick_for_each_loop_that_it_runs(halting, served):
    engine = Engine(served(halting=halting))
    handle = engine.submit(tokens(6), 8)
    ticks = 1
    while engine.step():
        ticks += 1
    depths = handle.depths
    assert len(depths) == 6 + 8 - 1
    assert ticks == max(depths[:6]) + sum(depths[6:])
    assert halting == "freeze" or set(depths) == {4}
    if halting == "freeze":
        assert len(set(depths)) > 1


def test_a_prompt_shares_the_ticks_of_tokens_under_way(served):
    engine = Engine(served(halting="off"), slots=2, chunk=2)
    first = engine.submit(tokens(2), 8)
    for _ in range(8):
        engine.step()
    before = len(first.tokens)
    second = engine.submit(tokens(7), 1)
    second.result()  # 4 chunks of 4 loops
    assert len(first.tokens) == before + 4


@pytest.mark.parametrize("ticks", [0, 1, 3, 9, 14])
def test_cancellation_loses_no_token(ticks, served):
    model = served(halting="freeze")
    requests = [dict(prompt=tokens(2, seed=i), max_new_tokens=12, seed=i) for i in range(5)]
    expected = [Engine(model).submit(**request).result().tolist() for request in requests]
    engine = Engine(model, slots=3)
    handles = [engine.submit(**request) for request in requests]
    for _ in range(ticks):
        engine.step()
    handles[1].cancel()
    handles[4].cancel()  # waits still
    assert handles[0].tokens or ticks < 9
    for i, (handle, whole) in enumerate(zip(handles, expected)):
        found = handle.result().tolist()
        assert found == (whole[: len(found)] if i in (1, 4) else whole)
        assert handle.finished == ("cancelled" if i in (1, 4) else "length")
    handles[1].cancel()  # again: nothing
    is_empty(engine)


def test_a_cancelled_prompt_leaves_nothing_in_the_loop(served, seen):
    model = served(halting="off")
    request = dict(prompt=tokens(2), max_new_tokens=10, n_loops=2)
    expected = Engine(model).submit(**request, temperature=0)
    expected.result()
    engine = Engine(model, slots=2)
    staying, gone = engine.submit(tokens(3), 20), engine.submit(tokens(9), 9, n_loops=16)
    engine.step()
    gone.cancel()
    handle = engine.submit(**request, temperature=0)  # takes the slot, and its rows of the caches
    handle.result()
    for a, b in zip(seen(handle), seen(expected), strict=True):
        assert torch.equal(a, b)
    staying.result()
    is_empty(engine)


def is_empty(engine):
    sequences = engine._sequences
    for cache in (sequences.looped, sequences.outer):
        assert cache.lengths == [0] * engine.slots and cache.free_rows == cache.rows
    assert engine._budget.claimed == 0
    assert sorted(engine._free_rows) == list(range(engine.slots + engine.chunk))
    assert sorted(engine._free_slots) == list(range(engine.slots))
    assert not engine._rows.limit.any()


def test_a_slot_used_again_holds_nothing_of_the_request_before(served, seen):
    model = served(halting="freeze")
    request = dict(prompt=tokens(5, seed=2), max_new_tokens=6, n_loops=6, temperature=0)
    expected = Engine(model, slots=1).submit(**request)
    expected.result()
    engine = Engine(model, slots=1, chunk=2)
    before, after = engine.submit(tokens(9), 9, n_loops=2), engine.submit(**request)
    before.result()
    assert not after.depths
    for cache in (engine._sequences.looped, engine._sequences.outer):
        assert cache.lengths == [0] and cache.free_rows == cache.rows
        for pool in cache.pools.values():
            for values in pool.values():
                values.fill_(float("nan"))
    after.result()
    assert after.depths == expected.depths
    for a, b in zip(seen(after), seen(expected), strict=True):
        assert torch.equal(a, b)
    is_empty(engine)


def test_a_halted_token_keeps_the_rows_of_its_loops_alone(served):
    engine = Engine(served(halting="freeze"), slots=2, chunk=4)
    handles = [engine.submit(tokens(9, seed=i), 9) for i in range(2)]
    while any(len(handle.depths) < 14 for handle in handles):
        engine.step()
    looped = engine._sequences.looped
    for active in engine._active:
        depths, first = active.handle.depths, looped.first[active.slot].tolist()
        assert looped.last[active.slot, : len(depths)].tolist() == [n - 1 for n in depths]
        at = 0
        for row, n in zip(first, depths):  # one page, without gaps
            assert row % 128 == at
            at += n


def test_memory_is_bounded_and_what_does_not_fit_waits_in_order(served):
    model = served(halting="freeze")
    free = Engine(model, slots=4)
    requests = [dict(prompt=tokens(9, seed=i), max_new_tokens=n, n_loops=16, seed=i) for i, n in enumerate((9, 2, 9))]
    expected = [free.submit(**request).result().tolist() for request in requests]
    need = [free._budget.claim_of(free.submit(**request).request) for request in requests]
    budget = need[0] + need[2] - 1
    engine = Engine(model, slots=4, budget=budget)
    handles = [engine.submit(**request) for request in requests]
    order = []
    while engine.step():
        pools = [*engine._sequences.looped.pools.values(), *engine._sequences.outer.pools.values()]
        assert sum(x.numel() * x.element_size() for pool in pools for x in pool.values()) <= budget
        order += [i for i, handle in enumerate(handles) if handle.tokens and i not in order]
        assert not (handles[2].depths and handles[0].finished == "")
    assert order == [0, 1, 2]
    assert [handle.result().tolist() for handle in handles] == expected
    with pytest.raises(ValueError, match=rf"max_new_tokens = 9: .*needs {need[0]} bytes.*budget is {need[0] - 1}"):
        Engine(model, budget=need[0] - 1).submit(**requests[0])
    Engine(model, budget=need[0]).submit(**requests[0]).result()


def test_with_few_latents_chunks_are_the_same_whatever_else_runs(served, seen):
    model, requests = served(halting="freeze"), asked(3)
    expected = [Engine(model, slots=1, chunk=4, keep=1).submit(**request) for request in requests]
    for handle in expected:
        handle.result()
    for handle, other in zip(expected, play(Engine(model, slots=3, chunk=4, keep=1), requests, 7)):
        assert handle.result().tolist() == other.result().tolist() and handle.depths == other.depths
    plain = [Engine(model, slots=1, chunk=4).submit(**request) for request in requests]
    for handle in plain:
        handle.result()
    assert any(not torch.equal(a, b) for one, two in zip(plain, expected) for a, b in zip(seen(one), seen(two)))


@pytest.mark.parametrize("halting", HALTINGS)
def test_an_exit_of_the_users_decides_which_tokens_halt(halting, served, seen):
    model = served(halting="off")  # the same weights whatever the halting
    expected = Engine(model).submit(tokens(5), 6, temperature=0, n_loops=2)
    expected.result()
    engine = Engine(served(halting=halting), slots=3, chunk=3)
    other = engine.submit(tokens(4, seed=9), 6, seed=1)
    calls = []

    def second(t, before, after):
        calls.append(t)
        assert before.shape == after.shape and not torch.equal(before, after)
        return torch.full(before.shape[:1], t == 1)

    handle = engine.submit(tokens(5), 6, temperature=0, exit=second)
    assert handle.result().tolist() == expected.result().tolist() and set(handle.depths) == {2} and set(calls) == {0, 1}
    for a, b in zip(seen(handle), seen(expected), strict=True):
        assert torch.equal(a, b)
    alone = Engine(served(halting=halting)).submit(tokens(4, seed=9), 6, seed=1)
    assert other.result().tolist() == alone.result().tolist()
    rows = engine.submit(tokens(5), 6, exit=lambda t, before, after: after[:, 0] > 0)
    rows.result()
    assert len(set(rows.depths)) > 1 and max(rows.depths) <= 4


RULES = {
    "act": "act",
    "head": exits.HeadExit(0.6),
    "latent": exits.LatentExit(0.4),
    "kl": exits.KLExit(0.5),
    "kl without coda": exits.KLExit(0.5, coda=False),
    "confidence": exits.ConfidenceExit(0.6),
    "entropy": exits.EntropyExit(1.0, maximum=3),
    "argmax": exits.ArgmaxExit(2),
    "function": lambda t, before, after: (after[..., 0] > 0) | (t == 2),
}


@pytest.mark.parametrize("halting", HALTINGS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_exit_rule_gives_the_tokens_of_generate(rule, halting, served):
    fields = dict(halting=halting, coda_layers=2)
    reference, model = tiny_model(**fields).double(), served(torch.float64, **fields)
    prompts = [tokens(n, seed=n) for n in (9, 4)]
    expected = [openmythos.generate(reference, [row], 8, temperature=0, exit=rule)[0].tolist() for row in prompts]
    engine = Engine(model, slots=3)
    engine.submit(tokens(5), 9)  # in a group of its own
    handles = [engine.submit(row, 8, temperature=0, exit=rule) for row in prompts]
    for handle, row, whole in zip(handles, prompts, expected):
        assert row.tolist() + handle.result().tolist() == whole
    assert len({n for handle in handles for n in handle.depths}) > 1


def test_chunks_are_the_same_whatever_else_runs_where_an_exit_reads_the_coda(served):
    model = served(halting="off", coda_layers=2)
    request = dict(prompt=tokens(9), max_new_tokens=8, seed=1, exit=exits.KLExit(0.5))
    expected = Engine(model, slots=1, chunk=4).submit(**request)
    expected.result()
    engine = Engine(model, slots=3, chunk=4)
    others = [engine.submit(tokens(7, seed=i), 4) for i in range(2)]
    handle = engine.submit(**request)
    assert handle.result().tolist() == expected.result().tolist() and handle.depths == expected.depths
    assert all(other.depths for other in others)


def test_bad_requests_fail_alone(served):
    engine = Engine(served(halting="freeze"), slots=2)
    good = engine.submit(tokens(3), 6, seed=1)

    def broken(t, before, after):
        raise KeyError("mine")

    failing = engine.submit(tokens(3), 6, exit=broken)
    with pytest.raises(RuntimeError, match="the request failed: 'mine'"):
        failing.result()
    assert failing.finished == "failed" and isinstance(failing.error, KeyError)
    with pytest.raises(ValueError, match="prompt"):
        engine.submit([99], 6)
    assert good.result().tolist() == Engine(engine.model).submit(tokens(3), 6, seed=1).result().tolist()
    is_empty(engine)


def test_a_request_without_numbers_fails_alone(served, seen):
    engine = Engine(served())
    handle = engine.submit(tokens(3), 6)
    with pytest.raises(ValueError, match="logits: found NaN"):
        handle.request.sample(torch.full((37,), float("nan")))
    others = [engine.submit(tokens(3), 6, seed=i, **o).request for i, o in enumerate(({}, {}, dict(temperature=0)))]
    rows = torch.randn(4, 37)
    rows[1], rows[2, 3] = float("nan"), float("inf")
    found = sample_each([others[0], handle.request, others[1], others[2]], rows)
    assert isinstance(found[1], ValueError) and isinstance(found[2], RuntimeError)
    assert found[0] == engine.submit(tokens(3), 6, seed=0).request.sample(rows[0]) and found[3] == int(rows[3].argmax())


def test_an_error_in_a_tick_ends_what_is_under_way_and_nothing_else(served, monkeypatch):
    engine = Engine(served(), slots=1)
    running, waiting = engine.submit(tokens(3), 6), engine.submit(tokens(3), 6, seed=1)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine._sequences, "loop", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    with pytest.raises(RuntimeError, match="division by zero"):
        running.result()
    assert waiting.result().tolist() == Engine(engine.model).submit(tokens(3), 6, seed=1).result().tolist()
    is_empty(engine)


def test_generate_starts_nothing_if_a_prompt_is_bad(served):
    engine = Engine(served())
    with pytest.raises(ValueError, match="prompt"):
        engine.generate([[1, 2], [99]], 4)
    assert not engine.step()
    rows = engine.generate(tokens(2, 3), 4, temperature=0)
    assert [row.shape for row in rows] == [(7,), (7,)] and torch.equal(rows[1][:3], tokens(2, 3)[1])


def test_requests_draw_from_generators_of_their_own(served):
    engine = Engine(served(), slots=4)
    one, two, three = (engine.submit(tokens(3), 12, seed=seed) for seed in (1, 1, 2))
    assert one.result().tolist() == two.result().tolist() != three.result().tolist()
    four, five = (engine.submit(tokens(3), 12) for _ in range(2))
    assert four.result().tolist() != five.result().tolist()


def test_handles_may_be_read_on_several_threads(served):
    engine, found = Engine(served(halting="freeze"), slots=2), {}
    handles = [engine.submit(tokens(3, seed=i), 8, seed=i) for i in range(4)]

    def read(i):
        found[i] = list(handles[i])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert found[i] == Engine(engine.model).submit(tokens(3, seed=i), 8, seed=i).result().tolist()


def test_an_idle_engine_sees_the_model_as_it_is(served):
    engine = Engine(served())
    engine.submit(tokens(3), 2).result()
    other = served(seed=3)
    engine.model.load_state_dict(other.state_dict(), assign=True)
    assert engine.submit(tokens(3), 6, temperature=0).result().tolist() == (
        Engine(other).submit(tokens(3), 6, temperature=0).result().tolist()
    )
    engine.model.double()
    engine.submit(tokens(3), 2).result()
