"""Decoding without calling modules: the bits of the calls that judge each module, and those where ops must not stand
in."""

import copy
import gc
import weakref

import pytest
import torch

import openmythos
from openmythos import KVCache
from openmythos.config import HALTINGS
from openmythos_kernels import accelerate, report
from openmythos_kernels.nn.paths import decode_token
from openmythos_kernels.runtime import backends
from tests.kit.tiny import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("needs_extension")

PROMPT, STEPS, LOOPS = 5, 4, 3


def fast(dtype=torch.float32, **fields):
    return accelerate(tiny_model(halt=0.3, **fields).to(dtype)).eval()


def filled(model, lengths=(PROMPT, PROMPT), capacity=PROMPT + STEPS, loops="each", **depth):
    cache = KVCache(capacity, loops)
    with torch.no_grad():
        model(tokens(len(lengths), PROMPT), kv_cache=cache, **depth)
    cache.truncate(lengths)
    return cache


@pytest.fixture
def calls(monkeypatch):
    """How many tokens ran without calling modules."""
    made, run = [], decode_token.run
    monkeypatch.setattr(decode_token, "run", lambda call: made.append(1) or run(call))
    return made


def eager(model, cache, **depth):
    """A token by calls that judge each module."""
    return lambda ids: openmythos.OpenMythos.forward(model, ids, kv_cache=cache, start_pos=cache.lengths, **depth)


def decoder(model, cache, **depth):
    """A token by calls of the model."""
    return lambda ids: model(ids, kv_cache=cache, start_pos=cache.lengths, **depth)


@torch.no_grad()
def check(model, calls, between=lambda t, model, caches: None, expected=STEPS, lengths=(PROMPT, PROMPT), **options):
    """Decodes STEPS tokens both ways; logits and caches must be the same to the bit."""
    depth = {"n_loops": LOOPS} | options.pop("depth", {})
    caches = [filled(model, lengths, **options, **depth) for _ in range(2)]
    plain, decode = eager(model, caches[0], **depth), decoder(model, caches[1], **depth)
    for t in range(STEPS):
        ids = tokens(len(lengths), 1, seed=t)
        assert torch.equal(decode(ids), plain(ids))
        assert caches[0].lengths == caches[1].lengths
        between(t, model, caches)
    assert len(calls) == expected
    for key, entry in caches[0].items():
        found = caches[1][key]
        assert found.lengths == entry.lengths
        if hasattr(entry, "tensors"):
            assert all(torch.equal(found.tensors[name], x) for name, x in entry.tensors.items())
        else:
            assert torch.equal(found.first, entry.first) and torch.equal(found.last, entry.last)
            for layer, pool in entry.pools.items():
                assert all(torch.equal(found.pools[layer][name], x) for name, x in pool.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("halting", HALTINGS)
def test_logits_and_caches_have_the_bits_of_the_models_calls(halting, dtype, calls):
    check(fast(dtype, halting=halting), calls)


CONFIGS = {
    "no LoRA": dict(lora_rank=0),
    "two core blocks": dict(core_layers=2),
    "residual": dict(injection="residual"),
    "zero state": dict(h0="zeros"),
    "two blocks outside": dict(prelude_layers=2, coda_layers=2),
    "dense core": dict(core_ffn="dense"),
}


@pytest.mark.parametrize("halting", ["evolve", "freeze"])
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_configurations(fields, halting, calls):
    check(fast(halting=halting, **fields), calls, lengths=(PROMPT, 2, 3))


@pytest.mark.parametrize("exit", ["act", "head", "latent", lambda t, before, after: after[..., 0] > 0])
def test_exits_that_read_no_predictions(exit, calls):
    check(fast(), calls, depth={"exit": exit})


OPTIONS = dict(logits_at=torch.zeros(2, dtype=torch.int64), return_hidden=True, return_ponder=True, exit="kl")


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_other_options_call_the_modules(option, calls):
    model, depth = fast(), {option: OPTIONS[option]}
    caches = [filled(model, **(depth if option == "exit" else {})) for _ in range(2)]
    found, expected = (make(model, cache, **depth)(tokens(2, 1)) for make, cache in zip((decoder, eager), caches))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not calls


@pytest.mark.parametrize("halting", ["evolve", "freeze"])
@pytest.mark.parametrize("loops", ["last", 2])
def test_caches_that_keep_few_loops(loops, halting, calls):
    check(fast(halting=halting), calls, loops=loops)


@pytest.mark.parametrize("halting", ["evolve", "freeze"])
def test_decoding_goes_on_after_truncate(halting, calls):
    check(fast(halting=halting), calls, lambda t, model, caches: [c.truncate([4 + t, 3]) for c in caches])


def test_a_cache_that_is_full_grows_in_a_call_of_the_model(calls):
    check(fast(), calls, capacity=PROMPT + 1, expected=STEPS - 1)


def test_weights_that_change_in_place_or_move_are_seen(calls):
    def change(t, model, caches):
        weight = model.recurrent.block.ffn.routed_experts[0].up.weight
        if t == 0:
            model.prelude[0].attn.wo.weight.mul_(1.5)
        elif t == 1:
            model.recurrent.act.halt.weight.data = model.recurrent.act.halt.weight.data * 2
        else:
            model.recurrent.block.ffn.routed_experts[0].up.weight = torch.nn.Parameter(weight.detach() * 2)

    check(fast(), calls, change)


def test_a_changed_setting_is_seen(calls):
    check(fast(), calls, lambda t, model, caches: setattr(model.cfg, "act_threshold", 0.1))


def test_another_dtype_is_seen(calls):
    model = fast()
    cache = filled(model, n_loops=LOOPS)
    decode = decoder(model, cache, n_loops=LOOPS)
    model.double()
    with torch.no_grad(), pytest.raises(ValueError, match="kv_cache"):
        decode(tokens(2, 1))
    assert not calls


@pytest.mark.parametrize(
    "part",
    ["", "prelude.0.ffn.up", "recurrent", "recurrent.block.ffn.routed_experts.3.down", "recurrent.lora.scale", "norm"],
)
@pytest.mark.parametrize("late", [False, True], ids=["before", "between tokens"])
def test_hooks_still_run(part, late, calls):
    seen = []

    def hook(t, model, caches):
        if t == 0:
            model.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))

    model = fast(n_experts=4, n_experts_per_tok=4)
    if not late:
        hook(0, model, ())
    check(model, calls, hook if late else lambda *_: None, expected=1 if late else 0)
    assert seen


def test_a_hook_that_was_removed_is_forgotten(calls):
    model = fast()
    hook = model.norm.register_forward_hook(lambda *_: None)
    check(model, calls, lambda t, *_: hook.remove() if t == 1 else None, expected=2)


class Louder(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def own_forward(model):
    block = model.coda[0]
    forward = block.forward
    block.forward = lambda *a, **k: 2 * forward(*a, **k)


def other_class(model):
    model.head.__class__ = Louder


def other_part(model):
    model.recurrent.block.attn.wo = Louder(*model.recurrent.block.attn.wo.weight.shape[::-1], bias=False)


def a_bias(model):
    model.recurrent.block.ffn.router.bias = torch.nn.Parameter(torch.ones(5))


@pytest.mark.parametrize("replace", [own_forward, other_class, other_part, a_bias])
def test_parts_replaced_between_tokens_are_called(replace, calls):
    check(fast(), calls, lambda t, model, caches: replace(model) if t == 1 else None, expected=2)


@pytest.mark.parametrize(
    "context", [torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16), lambda: backends.forcing("reference")]
)
def test_gradients_autocast_and_other_backends_call_the_model(context, calls):
    model, cache = fast(), KVCache()
    decode = decoder(model, cache, n_loops=LOOPS)
    with torch.no_grad(), context():
        caches = [cache, filled(model, n_loops=LOOPS)]
        cache.update(filled(model, n_loops=LOOPS))
        expected = eager(model, caches[1], n_loops=LOOPS)(tokens(2, 1))
        assert torch.equal(decode(tokens(2, 1)), expected)
    assert not calls


def test_watchers_see_every_loop(calls):
    model, seen = fast(halting="freeze"), []
    cache = filled(model, n_loops=LOOPS)
    decode = decoder(model, cache, n_loops=LOOPS)
    model.recurrent.watchers = (lambda running, t: seen.append(t),)
    with torch.no_grad():
        decode(tokens(2, 1))
    assert seen[:2] == [0, 1] and len(calls) == 1


def test_dropout_calls_the_model_unless_it_is_off(calls):
    model = fast(dropout=0.5).train()
    cache = filled(model)
    with torch.no_grad():
        decoder(model, cache)(tokens(2, 1))
    assert not calls
    model.generate(tokens(2, 3), 3, temperature=0)
    assert len(calls) == 2


def test_routing_is_recorded(calls):
    model = fast()
    caches = [filled(model) for _ in range(2)]
    chosen = []
    with torch.no_grad():
        for decode in (decoder(model, caches[0]), eager(model, caches[1])):
            with openmythos.recording_routing(model):
                decode(tokens(2, 1))
            chosen.append(torch.cat(model.recurrent.block.ffn.recorded))
    assert torch.equal(*chosen) and len(calls) == 1


@torch.no_grad()
def test_wrong_arguments_raise_what_the_model_raises():
    model = fast()
    cache = filled(model, n_loops=LOOPS)
    decode = decoder(model, cache, n_loops=LOOPS)
    for ids, name in ((tokens(3, 1), "start_pos"), (torch.full((2, 1), 99), "input_ids")):
        with pytest.raises(ValueError, match=name):
            decode(ids)
    with pytest.raises(ValueError, match="n_loops = 4"):
        decoder(model, cache, n_loops=4)(tokens(2, 1))
    with pytest.raises(ValueError, match="evolve"):
        decoder(model, cache, n_loops=LOOPS, exit="act")(tokens(2, 1))


@pytest.mark.parametrize("fields", [dict(attn_type="gqa"), dict(h0="noise"), dict(injection="concat")], ids=str)
@torch.no_grad()
def test_models_that_ops_cannot_stand_in_for(fields, calls):
    model = fast(**fields)
    decoder(model, filled(model))(tokens(2, 1))
    assert not calls


@torch.no_grad()
def test_a_weight_that_becomes_a_view_is_seen(calls):
    model = fast()
    wo = model.coda[0].attn.wo.weight

    def change(t, model, caches):
        if t == 1:  # the same memory, read the other way
            wo.data = torch.as_strided(wo.data, wo.shape, (1, wo.shape[0]))

    check(model, calls, change, expected=2)


NUMBERS = {
    "eps of a norm": lambda model: setattr(model.prelude[0].ffn_norm, "eps", 0.5),
    "eps of the latent norms": lambda model: [
        setattr(norm, "eps", 0.5) for norm in (model.coda[0].attn.q_norm, model.coda[0].attn.kv_norm)
    ],
    "experts of a token": lambda model: setattr(model.recurrent.block.ffn, "topk", 1),
}


@pytest.mark.parametrize("change", NUMBERS.values(), ids=NUMBERS)
def test_numbers_in_attributes_are_seen(change, calls):
    check(fast(), calls, lambda t, model, caches: change(model) if t == 1 else None)


def test_a_model_is_not_kept_alive():
    model = fast()
    with torch.no_grad():
        decoder(model, filled(model))(tokens(2, 1))
    seen = [weakref.ref(model), weakref.ref(model.recurrent)]
    del model
    gc.collect()
    assert [one() for one in seen] == [None, None]


@torch.no_grad()
def test_a_copy_of_a_model_that_has_decoded_decodes(calls):
    model = fast()
    decoder(model, filled(model))(tokens(2, 1))
    other = copy.deepcopy(model)
    other.norm.weight.mul_(2)
    found = [decoder(m, filled(m))(tokens(2, 1)) for m in (model, other)]
    torch.testing.assert_close(2 * found[0], found[1])
    assert len(calls) == 3


def test_the_report_says_so():
    rows = {row.name: row for row in report(fast())}
    paths = {path.name: path for path in rows["(model)"].paths}
    assert paths["decode_token"].backend == "cpu" and paths["cuda_graph"].reason == "not on a GPU"
    rows = {row.name: row for row in report(fast(h0="noise"))}
    paths = {path.name: path for path in rows["(model)"].paths}
    assert "noise" in paths["decode_token"].reason
