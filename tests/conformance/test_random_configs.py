"""The reference computes what upstream computes: logits, gradients and cached decoding, over random configurations.

Two precisions answer two questions. In float64 rounding plays no part, so every gradient agrees to 1e-6 unless the
formulas differ. (Upstream's rotation always rounds to float32; the test replaces it with a float64 one.) In float32
logits agree to 1e-5 and gradients to 1e-4. A gradient whose terms nearly cancel, like that of the halting bias or of a
single token's queries, is rounding noise in both models. There the reference may be twice as far from the float64
gradient as upstream, plus 2 units in the last place of the whole gradient's norm.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch

from openmythos import MythosConfig, OpenMythos
from tests.kit.tiny import enliven, relative, tokens

CONFIGS = 104


def draw(index: int):
    """Configuration number `index`, with token ids and a number of loops."""
    r = random.Random(index)
    attn_type = ("mla", "gqa")[index % 2]
    n_heads = r.choice([1, 2, 3, 4])
    head_dim = 2 * r.randint(1, 5)
    n_experts = r.randint(1, 9)
    max_loop_iters = r.randint(1, 5)
    fields = dict(
        vocab_size=r.randint(2, 41),
        dim=n_heads * head_dim if attn_type == "gqa" else r.randint(2, 37),
        n_heads=n_heads,
        n_kv_heads=r.choice([k for k in range(1, n_heads + 1) if n_heads % k == 0]),
        max_seq_len=16,
        max_loop_iters=max_loop_iters,
        prelude_layers=r.randint(0, 2),
        coda_layers=r.randint(0, 2),
        attn_type=attn_type,
        # One head and an odd rank: upstream cannot rotate a single token; see test_differences.
        kv_lora_rank=r.randint(1, 17) if n_heads > 1 else 2 * r.randint(1, 8),
        q_lora_rank=r.randint(1, 17),
        qk_rope_head_dim=2 * r.randint(1, 5),
        qk_nope_head_dim=r.randint(1, 9),
        v_head_dim=r.randint(1, 9),
        n_experts=n_experts,
        n_shared_experts=r.randint(0, 2),
        n_experts_per_tok=r.randint(1, n_experts),
        expert_dim=r.randint(1, 13),
        act_threshold=r.choice([1e-6, 0.5, 0.9, 0.99, 0.999, 1.0]),
        rope_theta=r.choice([10.0, 10000.0, 500000.0]),
        lora_rank=r.randint(1, 5),
    )
    depth = r.choice([None, 1, max(1, max_loop_iters - 1), max_loop_iters, max_loop_iters + r.randint(1, 3)])
    ids = tokens(r.randint(1, 3), r.randint(1, 9), seed=index, vocab=fields["vocab_size"])
    return fields, ids, depth


def both(upstream, index: int, dtype=torch.float32):
    """(ours, theirs, ids, depth); the weights are drawn in one model and loaded into the other, in turns."""
    fields, ids, depth = draw(index)
    ours, theirs = OpenMythos(MythosConfig(**fields)), upstream.OpenMythos(upstream.MythosConfig(**fields))
    source, target = (ours, theirs) if index % 4 < 2 else (theirs, ours)
    enliven(source, index, halt=random.Random(index).choice([0.3, 1.0]))
    target.load_state_dict(source.state_dict(), strict=True)
    return ours.to(dtype), theirs.to(dtype) if dtype != torch.float32 else theirs, ids, depth


def gradients(model, ids, depth):
    """(logits, parameter name -> gradient) for one fixed random direction of the logits."""
    logits = model(ids, n_loops=depth)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * direction.to(logits.dtype)).sum().backward()
    # Experts that no token chose have no gradient in upstream, and a zero gradient here.
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return logits.detach(), grads


def rope_in_float64(x, freqs_cis):
    rotated = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * freqs_cis[:, None]
    return torch.view_as_real(rotated).flatten(-2)


@pytest.mark.parametrize("index", range(CONFIGS))
def test_logits_and_gradients(upstream, monkeypatch, index):
    ours, theirs, ids, depth = both(upstream, index)
    wide = copy.deepcopy(ours).double(), copy.deepcopy(theirs).double()

    logits, grads = gradients(ours, ids, depth)
    expected, expected_grads = gradients(theirs, ids, depth)
    assert relative(logits, expected) <= 1e-5

    monkeypatch.setattr(upstream, "apply_rope", rope_in_float64)
    (wide_logits, exact), (wide_expected, wide_grads) = (gradients(model, ids, depth) for model in wide)
    assert relative(wide_logits, wide_expected) <= 1e-9
    assert grads.keys() == expected_grads.keys()
    last_place = torch.finfo(torch.float32).eps * float(torch.stack([g.norm() for g in exact.values()]).norm())
    for name, g in grads.items():
        if float((exact[name] - wide_grads[name]).norm()) > 1e-9 * last_place:
            assert relative(exact[name], wide_grads[name]) <= 1e-6, name
        if relative(g, expected_grads[name]) > 1e-4:
            error, allowed = (float((x - exact[name]).norm()) for x in (g, expected_grads[name]))
            assert error <= 2 * allowed + 2 * last_place, name


@pytest.mark.parametrize("index", range(CONFIGS))
def test_decoding_with_a_cache(upstream, index):
    """A prompt, then single tokens, with a plain dict as cache."""
    ours, theirs, ids, depth = both(upstream, index)
    ids = torch.cat((ids, tokens(ids.shape[0], 3, seed=index + 1000, vocab=ours.cfg.vocab_size)), dim=1)
    prompt = ids.shape[1] - 3
    mine, other = {}, {}
    with torch.no_grad():
        for start, end in [(0, prompt), *((n, n + 1) for n in range(prompt, prompt + 3))]:
            logits = ours(ids[:, start:end], n_loops=depth, kv_cache=mine, start_pos=start)
            expected = theirs(ids[:, start:end], n_loops=depth, kv_cache=other, start_pos=start)
            assert relative(logits, expected) <= 1e-5
    assert mine.keys() == other.keys()
    for key, entry in mine.items():
        assert entry.lengths == [ids.shape[1]] * ids.shape[0]
        kept = {"latent": "c_kv", "k_rope": "k_rope"} if ours.cfg.attn_type == "mla" else {"k": "k", "v": "v"}
        for name, theirs_name in kept.items():
            held, expected = entry.tensors[name][:, : ids.shape[1]], other[key][theirs_name]
            if name == "latent":  # upstream keeps it without its norm
                expected = norm_of(theirs, key)(expected)
            if name == "k_rope":  # and repeats the shared key for every head
                expected = expected[:, :, 0]
            assert relative(held, expected) <= 1e-4


def norm_of(model, key: str):
    """The norm of the latent in the layer whose cache entry is `key`."""
    kind, number = key.split("_")[0], key.split("_")[-1]
    block = model.recurrent.block if kind == "recurrent" else getattr(model, kind)[int(number)]
    return block.attn.kv_norm


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_fresh_models_have_the_same_state_and_statistics(upstream, attn_type):
    fields = dict(draw(0)[0], attn_type=attn_type, dim=32, n_heads=2, n_kv_heads=1, vocab_size=512)
    ours, theirs = OpenMythos(MythosConfig(**fields)), upstream.OpenMythos(upstream.MythosConfig(**fields))
    a, b = ours.state_dict(), theirs.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
    assert ours.head.weight is ours.embed.weight
    for name in a:
        if a[name].is_complex() or (a[name].numel() > 1 and a[name].unique().numel() == 1):
            assert torch.equal(a[name], b[name]), name
        elif a[name].numel() > 500:
            assert 0.9 < a[name].std() / b[name].std() < 1.1, name
    ours.load_state_dict(b, strict=True)
    theirs.load_state_dict(a, strict=True)


def test_default_config_is_upstreams(upstream):
    theirs = vars(upstream.MythosConfig())
    assert {name: getattr(MythosConfig(), name) for name in theirs} == theirs
