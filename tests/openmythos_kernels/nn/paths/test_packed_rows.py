"""Freeze that skips: outputs, gradients and caches equal those of the reference, which computes every position."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F

from openmythos import KVCache, MythosConfig, OpenMythos
from openmythos.exits import ArgmaxExit, ConfidenceExit, LatentExit
from openmythos.ragged import RAGGED_KEY
from openmythos_kernels import accelerate
from openmythos_kernels.nn import paths
from openmythos_kernels.nn.paths import mla_packed, mla_packed_recompute, packed_rows
from tests.kit.thresholds import set_threshold
from tests.kit.tiny import enliven, relative, tiny_model, tokens

INJECTIONS = ["mythos", "residual", "parcae", "concat", "add"]
EXITS = {
    "configured": None,
    "act": "act",
    "head": "head",
    "latent": LatentExit(0.3),
    "confidence": ConfidenceExit(0.3, coda=False),
    "argmax through the coda": ArgmaxExit(2, minimum=2, maximum=4),
    "function": lambda t, before, after: after[..., 0] > 0.3,
}


def frozen(**fields):
    """A float64 model whose positions halt at different depths, and the same one accelerated."""
    model = tiny_model(**{"halting": "freeze", "act_threshold": 0.9, "max_loop_iters": 6, **fields}).double().eval()
    return model, accelerate(copy.deepcopy(model))


@pytest.fixture
def ran():
    """The paths that ran."""
    seen = []
    before, paths.listener = paths.listener, lambda module, path: seen.append(path)
    yield seen
    paths.listener = before


@pytest.fixture(params=[mla_packed, mla_packed_recompute], ids=["kept", "recomputed"])
def training(request, monkeypatch):
    """The path by which attention trains."""
    set_threshold(monkeypatch, "mla_recompute", 1 << 30 if request.param is mla_packed else 0)
    return request.param


def gradients(model, ids, **options):
    model.zero_grad()
    F.cross_entropy(model(ids, **options).flatten(0, 1), ids.flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_chunks(model, ids, cache, cuts, **options):
    """Logits of the tokens in several calls."""
    parts = [
        model(ids[:, a:b], kv_cache=cache, start_pos=a, **options) for a, b in zip([0, *cuts], [*cuts, ids.shape[1]])
    ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("exit", EXITS.values(), ids=EXITS)
@pytest.mark.parametrize("fields", [{"injection": i} for i in INJECTIONS] + [{"core_layers": 2}], ids=str)
def test_prompts(fields, exit, ran):
    model, fast = frozen(**fields)
    ids = tokens(3, 9)
    with torch.no_grad():
        assert relative(fast(ids, exit=exit), model(ids, exit=exit)) < 1e-12
    assert packed_rows in ran


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("core_layers", [1, 2])
def test_every_gradient(injection, core_layers, training, ran):
    model, fast = frozen(injection=injection, core_layers=core_layers, act_remainder="last")
    ids = tokens(3, 9)
    for options in ({}, {"grad_loops": 2}, {"exit": LatentExit(0.3)}):
        expected, found = gradients(model, ids, **options), gradients(fast, ids, **options)
        assert found.keys() == expected.keys()
        scale = max(g.norm() for g in expected.values())
        for name, g in expected.items():
            assert (found[name] - g).norm() <= 1e-12 * max(g.norm(), 1e-3 * scale), (name, options)
    assert training in ran


@pytest.mark.parametrize("options", [{}, {"grad_loops": 2}, {"grad_loops": 5}], ids=str)
def test_gradients_in_16_bits_err_as_the_references(options, training, ran):
    model, fast = (m.float() for m in frozen())
    ids = tokens(3, 9)
    exact = gradients(model, ids, **options)
    with torch.autocast("cpu", torch.bfloat16):
        eager, found = gradients(model, ids, **options), gradients(fast, ids, **options)

    def error(some):
        return sum((some[name] - g).square().sum() for name, g in exact.items()).sqrt()

    assert error(found) <= 2 * error(eager)
    assert training in ran and not {mla_packed, mla_packed_recompute} - {training} & set(ran)


def test_one_path_in_all_loops_of_a_forward(monkeypatch):
    """Another one could not read what the first has kept; zeros in its place would go unnoticed."""
    _, fast = frozen()
    calls = []

    def changes(call):
        calls.append(call)
        return "a test" if len(calls) > 2 else refuses(call)

    refuses = mla_packed_recompute.refuses
    set_threshold(monkeypatch, "mla_recompute", 0)
    monkeypatch.setattr(mla_packed_recompute, "refuses", changes)
    with pytest.raises(RuntimeError, match="PackedAttention after loops of PackedRecompute"):
        fast(tokens(3, 9))


@pytest.mark.parametrize("options", [{}, {"grad_loops": 2}], ids=str)
def test_every_gradient_under_hooks_of_saved_tensors(options, ran):
    model, fast = frozen()
    ids = tokens(3, 9)
    expected = gradients(model, ids, **options)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        found = gradients(fast, ids, **options)
    assert max(relative(found[name], g) for name, g in expected.items()) < 1e-12
    assert mla_packed in ran


def test_same_bits_each_run_and_a_second_backward(training):
    _, fast = frozen()
    ids = tokens(3, 9)
    first = gradients(fast, ids)
    for _ in range(3):
        assert all(torch.equal(g, first[name]) for name, g in gradients(fast, ids).items())
    fast.zero_grad()
    loss = F.cross_entropy(fast(ids).flatten(0, 1), ids.flatten())
    loss.backward(retain_graph=True)
    fast.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, first[name]) for name, p in fast.named_parameters() if p.grad is not None)


def test_second_derivatives(training):
    model, fast = frozen(core_ffn="dense")
    ids = tokens(2, 6)
    found = []
    for m in (model, fast):
        weights = [m.recurrent.block.attn.kv_down.weight, m.recurrent.block.attn.kv_up.weight, m.embed.weight]
        loss = F.cross_entropy(m(ids).flatten(0, 1), ids.flatten())
        first = torch.autograd.grad(loss, weights, create_graph=True)
        found.append(torch.autograd.grad(sum((g * g).sum() for g in first), weights))
    for ours, theirs in zip(*found[::-1]):
        assert relative(ours, theirs) < 1e-10


def test_training_keeps_what_ran_and_nothing_else():
    """Numbers saved for the backward grow with the loops that positions ran, not with the loops that there are."""
    saved = {}
    for bias in (-30.0, 30.0):  # nothing halts; everything halts in loop 0
        _, fast = frozen(max_loop_iters=12)
        with torch.no_grad():
            fast.recurrent.act.halt.weight.zero_()
            fast.recurrent.act.halt.bias.fill_(bias)
        total = [0]

        def count(x, total=total):
            total[0] += x.numel() if x._base is None else 0
            return x

        import torch.autograd.graph as graph

        seen = graph.saved_tensors_hooks(count, lambda x: x)
        with seen:
            fast(tokens(3, 20))
        saved[bias] = total[0]
    assert saved[-30.0] > 4 * saved[30.0]


@pytest.mark.parametrize("cuts", [(4, 7, 8), (1,), (2, 3, 4, 5, 6, 7, 8), ()])
@pytest.mark.parametrize("exit", [None, "act", LatentExit(0.3)], ids=["configured", "act", "latent"])
@pytest.mark.parametrize("fields", [{}, {"injection": "parcae"}, {"core_layers": 2}], ids=str)
def test_chunks_and_single_tokens_through_a_cache(fields, exit, cuts):
    model, fast = frozen(**fields)
    ids = tokens(3, 9)
    caches = KVCache(), KVCache()
    with torch.no_grad():
        whole = model(ids, exit=exit)
        for m, cache in zip((model, fast), caches):
            assert relative(in_chunks(m, ids, cache, cuts, exit=exit), whole) < 1e-12
    ragged = [cache[RAGGED_KEY] for cache in caches]
    assert ragged[0].last[:, :9].tolist() == ragged[1].last[:, :9].tolist()
    assert len(set(ragged[0].last[:, :9].flatten().tolist())) > 1  # else nothing was tested


@pytest.mark.parametrize("kept", ["last", 1, 2, 3])
@pytest.mark.parametrize("fields", [{}, {"halting": "evolve"}, {"halting": "off"}, {"core_layers": 2}], ids=str)
def test_caches_that_keep_fewer_loops(fields, kept):
    """An approximation, and both compute the same one."""
    model, fast = frozen(**fields)
    ids = tokens(3, 9)
    with torch.no_grad():
        expected = in_chunks(model, ids, KVCache(loops=kept), (4, 7, 8))
        assert relative(in_chunks(fast, ids, KVCache(loops=kept), (4, 7, 8)), expected) < 1e-12
        assert relative(expected, model(ids)) > 1e-6


def test_rows_of_different_length():
    model, fast = frozen()
    ids, more = tokens(3, 9), tokens(3, 4, seed=1)
    with torch.no_grad():
        found = []
        for m in (model, fast):
            cache = KVCache()
            m(ids, kv_cache=cache)
            cache.truncate([9, 4, 6])
            out = [m(more[:, :3], kv_cache=cache, start_pos=[9, 4, 6])]
            out.append(m(more[:, 3:], kv_cache=cache, start_pos=[12, 7, 9]))
            found.append(torch.cat(out, 1))
        assert relative(*found[::-1]) < 1e-12
        alone = model(torch.cat((ids[1:2, :4], more[1:2]), 1))[:, 4:]
        assert relative(found[0][1:2], alone) < 1e-12


@pytest.mark.parametrize("threshold", [1e-9, 1e9])
def test_everything_or_nothing_halts(threshold):
    model, fast = frozen(act_threshold=threshold)
    ids = tokens(2, 7)
    with torch.no_grad():
        for options in ({}, {"n_loops": 1}):
            assert relative(fast(ids, **options), model(ids, **options)) < 1e-12
        evolve = copy.deepcopy(model)
        evolve.cfg.halting = evolve.recurrent.cfg.halting = "evolve"
        assert relative(fast(ids), evolve(ids)) < 1e-12


def test_a_position_per_sequence_runs_to_the_end(ran):
    model, fast = frozen()

    def one(t, before, after):  # the last position of a sequence, packed or not
        stays = torch.zeros(after.shape[:-1], dtype=torch.bool)
        stays.view(-1)[-1] = True
        return ~stays

    ids = tokens(1, 7)
    with torch.no_grad():
        assert relative(fast(ids, exit=one), model(ids, exit=one)) < 1e-12


def test_nan_states_end():
    """A NaN reaches no later loop's bookkeeping: the call ends, and other sequences are not touched."""
    _, fast = frozen()
    with torch.no_grad():
        fast.embed.weight[5] = float("nan")
        ids = tokens(2, 7)
        ids[ids == 5] = 6
        ids[0, 3] = 5
        out = fast(ids)
    out = torch.cat((out[..., :5], out[..., 6:]), -1)  # the head's row of token 5 is NaN, too
    assert not out[0, 3].isfinite().any() and out[1].isfinite().all()


@pytest.mark.parametrize("threshold, depth", [(1.0, 2), (1.5, 3), (0.5, 1)])
def test_a_threshold_met_exactly(threshold, depth, ran):
    """Every probability is 1/2, and sums of them are exact: a position halts in the loop in which they reach it."""
    model, fast = frozen(act_threshold=threshold)
    ids = tokens(2, 7)
    for m in (model, fast):
        m.recurrent.act.halt.weight.data.zero_()
        m.recurrent.act.halt.bias.data.zero_()
    with torch.no_grad():
        for m in (model, fast):
            cache = KVCache()
            in_chunks(m, ids, cache, (3, 6))  # the last one is decoded
            assert set(cache[RAGGED_KEY].last[:, :7].flatten().tolist()) == {depth - 1}
        assert relative(fast(ids), model(ids)) < 1e-12
    assert packed_rows in ran


@pytest.mark.parametrize("causal", [True, False])
def test_other_masks(causal, ran):
    """A tensor is a causal mask only if its numbers say so."""
    model, fast = frozen()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    mask = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    if causal:
        mask = torch.full_like(mask, float("-inf")).triu(1)
    with torch.no_grad():
        found = [m.recurrent(x, x, m.freqs_cis_mla[:7], mask) for m in (model, fast)]
    assert relative(*found[::-1]) < 1e-12 and (packed_rows in ran) == causal


def test_what_is_left_alone(ran):
    model, _ = frozen()
    hooked = accelerate(copy.deepcopy(model))
    hooked.recurrent.block.register_forward_hook(lambda *_: None)
    untrimmed = accelerate(copy.deepcopy(model))
    untrimmed.recurrent.trim = False
    ids = tokens(2, 7)
    with torch.no_grad():
        for m in (hooked, untrimmed):
            assert relative(m(ids), model(ids)) < 1e-12
        gqa, fast = frozen(attn_type="gqa")
        assert relative(fast(ids), gqa(ids)) < 1e-12
    assert packed_rows not in ran


def draw(index: int):
    """A configuration, ids, cuts and an exit."""
    r = random.Random(index)
    n_experts = r.randint(1, 6)
    fields = dict(
        vocab_size=r.randint(3, 41),
        dim=r.randint(2, 33),
        n_heads=r.randint(1, 3),
        max_seq_len=16,
        max_loop_iters=r.randint(1, 6),
        prelude_layers=r.randint(0, 2),
        coda_layers=r.randint(0, 2),
        kv_lora_rank=r.randint(1, 17),
        q_lora_rank=r.randint(1, 17),
        qk_rope_head_dim=2 * r.randint(1, 4),
        qk_nope_head_dim=r.randint(1, 9),
        v_head_dim=r.randint(1, 9),
        n_experts=n_experts,
        n_shared_experts=r.randint(0, 2),
        n_experts_per_tok=r.randint(1, n_experts),
        expert_dim=r.randint(1, 13),
        lora_rank=r.randint(0, 4),
        act_threshold=r.choice([1e-6, 0.5, 0.9, 0.99, 1.0, 3.0]),
        injection=r.choice(INJECTIONS),
        h0=r.choice(["e", "zeros"]),
        halting=r.choice(["freeze", "freeze", "evolve", "off"]),
        act_remainder=r.choice(["drop", "last"]),
        core_layers=r.randint(1, 2),
        core_ffn=r.choice(["moe", "dense"]),
    )
    length = r.randint(1, 10)
    ids = tokens(r.randint(1, 4), length, seed=index, vocab=fields["vocab_size"])
    exits = [None, LatentExit(r.choice([0.03, 0.3, 1.0])), "head", "act"]
    exit = None if fields["halting"] == "freeze" and r.random() < 0.6 else r.choice(exits)
    cuts = sorted(r.sample(range(1, length), r.randint(0, length - 1))) if length > 1 else []
    loops = r.choice([None, 1, fields["max_loop_iters"] + r.randint(0, 3)])
    return fields, ids, exit, cuts, loops, r.choice(["each", "each", "last", 2])


def check_random(index: int) -> None:
    fields, ids, exit, cuts, loops, kept = draw(index)
    model = enliven(OpenMythos(MythosConfig(**fields)), index, halt=random.Random(index).choice([0.3, 1.0])).double()
    fast = accelerate(copy.deepcopy(model.eval()))
    options = {"n_loops": loops, "exit": exit}
    with torch.no_grad():
        expected = model(ids, **options)
        scale = expected.abs().max()
        assert (fast(ids, **options) - expected).abs().max() <= 1e-11 * scale, index
        reference = in_chunks(model, ids, KVCache(loops=kept), cuts, **options)
        assert (in_chunks(fast, ids, KVCache(loops=kept), cuts, **options) - reference).abs().max() <= 1e-11 * scale
        if kept == "each":
            assert (reference - expected).abs().max() <= 1e-11 * scale, index
    if index % 4 == 0:
        expected, found = gradients(model, ids, **options), gradients(fast, ids, **options)
        assert found.keys() == expected.keys()
        scale = max(g.norm() for g in expected.values())
        for name, g in expected.items():
            assert (found[name] - g).norm() <= 1e-10 * max(g.norm(), 1e-3 * scale), (index, name)


@pytest.mark.parametrize("index", range(24))
def test_random_configurations(index):
    check_random(index)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(24, 1000))
def test_a_thousand_random_configurations(index):
    check_random(index)
