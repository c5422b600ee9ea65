"""Decoding through whole-layer ops: logits and caches equal the reference's, and hooks and dropout still run."""

import pytest
import torch

import openmythos
from openmythos import KVCache, OpenMythos
from openmythos.config import HALTINGS, INJECTIONS
from openmythos.ragged import RAGGED_KEY
from openmythos_kernels import accelerate
from openmythos_kernels.nn.paths import decode_block, decode_loop
from openmythos_kernels.runtime import backends
from tests.kit.tiny import enliven, tiny_config

pytestmark = pytest.mark.usefixtures("needs_extension")

PROMPT, TOKENS, LOOPS = 5, 4, 3
CONFIGS = {
    "plain": {},
    "no LoRA": dict(lora_rank=0),
    "dense core": dict(core_ffn="dense"),
    "two core blocks": dict(core_layers=2),
    "residual": dict(injection="residual"),
    "remainder at the last loop": dict(act_remainder="last"),
    "early halting": dict(act_threshold=0.3),
    "zero state": dict(h0="zeros"),
}


@pytest.fixture
def used(monkeypatch):
    """The names of the whole-layer ops that were called."""
    names = []
    for module, name in ((decode_block, "block_decode"), (decode_loop, "loop_decode")):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _op=op, _name=name, **k: names.append(_name) or _op(*a, **k))
    return names


def model(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    return enliven(OpenMythos(tiny_config(**fields))).to(dtype).eval()


@torch.no_grad()
def decoded(model, starts=(PROMPT, PROMPT), **options):
    """Logits of TOKENS decoded tokens per row after prompts of `starts` tokens, and the content of the caches.

    By the reference's forward, over the modules: `decode_token` would take whole tokens.
    """
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, model.cfg.vocab_size, (len(starts), max(starts) + TOKENS), generator=generator)
    cache = KVCache(capacity=max(starts) + 2)  # too small, so that the cache grows
    model(ids[:, : max(starts)], n_loops=LOOPS, kv_cache=cache)
    cache.truncate(starts)
    logits = []
    for t in range(TOKENS):
        start = [n + t for n in starts]
        token = torch.stack([ids[b, n] for b, n in enumerate(start)])[:, None]
        out = OpenMythos.forward(model, token, n_loops=LOOPS, kv_cache=cache, start_pos=start, **options)
        logits += out if isinstance(out, tuple) else [out]
    ragged = cache.pop(RAGGED_KEY, None)
    held = [
        entry.tensors[name][b, :n]
        for entry in cache.values()
        for name in entry.tensors
        for b, n in enumerate(entry.lengths)
    ]
    for t in range(LOOPS if ragged else 0):
        rows = ragged.row(t)
        held += [x[rows[b, :n]] for x in ragged.pools[""].values() for b, n in enumerate(ragged.lengths)]
    return logits + held


@pytest.mark.parametrize("starts", [(PROMPT, PROMPT), (PROMPT, 2, 3)], ids=["even", "ragged"])
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_caches_equal_the_references(fields, starts, used):
    expected = decoded(model(torch.float64, **fields), starts)
    found = decoded(accelerate(model(torch.float64, **fields)), starts)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    outside = len(model().prelude) + len(model().coda)
    assert used.count("loop_decode") == TOKENS and used.count("block_decode") == TOKENS * outside


@pytest.mark.parametrize("halting", HALTINGS)
@pytest.mark.parametrize("injection", INJECTIONS)
def test_every_injection_and_halting_decodes_as_the_reference(injection, halting, used):
    fields = dict(injection=injection, halting=halting)
    expected, found = decoded(model(torch.float64, **fields)), decoded(accelerate(model(torch.float64, **fields)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    whole = halting != "freeze" and injection in ("mythos", "residual")
    assert ("loop_decode" in used) == whole


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
def test_other_dtypes(dtype, tolerance, used):
    for a, b in zip(decoded(accelerate(model(dtype))), decoded(model(dtype)), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert "loop_decode" in used


def test_ponder_cost(used):
    for a, b in zip(
        decoded(accelerate(model()), return_ponder=True), decoded(model(), return_ponder=True), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert "loop_decode" in used


def test_routing_is_counted_and_recorded(used):
    def counts(model):
        with openmythos.recording_routing(model):
            decoded(model.train())
        moe = model.recurrent.block.ffn
        return moe.expert_load, torch.stack([x for x in moe.recorded if len(x) == 2])

    for a, b in zip(counts(accelerate(model(dropout=0.0))), counts(model(dropout=0.0))):
        assert torch.equal(a, b)
    assert "loop_decode" in used


@pytest.mark.parametrize(
    "part",
    [
        "recurrent.block",
        "recurrent.block.attn",
        "recurrent.block.attn.wo",
        "recurrent.block.ffn",
        "recurrent.block.ffn.router",
        "recurrent.block.ffn_norm",
        "recurrent.block.ffn.routed_experts.0.up",
        "recurrent.block.ffn.shared_experts.0",
        "recurrent.lora.down",
        "recurrent.act",
        "recurrent.norm",
        "recurrent.injection",
    ],
)
def test_hooks_on_parts_of_the_loop_still_run(part, used):
    swapped, seen = accelerate(model(n_experts_per_tok=4, n_experts=4)), []
    swapped.get_submodule(part).register_forward_hook(lambda *a: seen.append(1))
    expected = decoded(model(n_experts_per_tok=4, n_experts=4))
    for a, b in zip(decoded(swapped), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert seen and "loop_decode" not in used


def test_replaced_parts_are_called(used):
    class Louder(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def louder(model):
        model.recurrent.block.attn.wo.__class__ = Louder
        return model

    for a, b in zip(decoded(accelerate(louder(model()))), decoded(louder(model())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert "loop_decode" not in used


def test_calls_that_the_ops_do_not_support(used):
    """Gradients, dropout, autocast, halting="freeze" and another forced backend take the reference's path."""
    swapped = accelerate(model())
    ids = torch.zeros(1, 1, dtype=torch.int64)
    swapped(ids, kv_cache=KVCache())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        swapped(ids, kv_cache=KVCache())
    with torch.no_grad(), backends.forcing("reference"):
        swapped(ids, kv_cache=KVCache())
    with torch.no_grad():
        accelerate(model(dropout=0.5)).train()(ids, kv_cache=KVCache())
        swapped(ids)  # no cache to append to
    assert not used
    with torch.no_grad():
        accelerate(model(halting="freeze"))(ids, kv_cache=KVCache())
    assert "loop_decode" not in used


@torch.no_grad()
def test_a_weight_of_the_wrong_shape_is_named(used):
    swapped = accelerate(model())
    swapped.recurrent.block.attn.wo.weight = torch.nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="wo: got"):
        swapped(torch.zeros(1, 1, dtype=torch.int64), kv_cache=KVCache())
