"""Where the reference departs from upstream on purpose: each test shows upstream's behavior and ours."""

from __future__ import annotations

import pytest
import torch

from openmythos import KVCache, LTIInjection, MythosConfig, OpenMythos, update_router_bias
from tests.kit.tiny import SMALL, enliven, relative, tiny_config, tokens


def both(upstream, **fields):
    """(ours, theirs) in eval mode with the same weights."""
    ours = enliven(OpenMythos(tiny_config(**fields)))
    theirs = upstream.OpenMythos(upstream.MythosConfig(**{**SMALL, **fields}))
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("attn_type, table", [("mla", "freqs_cis_mla"), ("gqa", "freqs_cis")])
def test_rotary_tables_survive_bfloat16(upstream, attn_type, table):
    ours, theirs = both(upstream, attn_type=attn_type)
    before = getattr(ours, table).clone()
    ours, theirs = ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
    assert not getattr(theirs, table).is_complex()
    assert torch.equal(getattr(ours, table), before)
    assert torch.equal(ours.to(torch.float32).to(torch.float16).double().half().state_dict()[table], before)


@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_bfloat16_forward_runs(upstream):
    ours, theirs = both(upstream)
    ids = tokens(2, 7)
    expected = ours(ids)
    loop_out = []
    theirs.recurrent.register_forward_hook(lambda module, args, out: loop_out.append(out.dtype))
    theirs = theirs.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
        theirs(ids)
    assert not loop_out  # the float32 mask already raised
    with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
        theirs(ids[:, :1])
    assert loop_out == [torch.float32]  # without a mask it gets to the coda, which receives float32
    logits = ours.to(torch.bfloat16)(ids)
    assert logits.dtype == torch.bfloat16
    assert relative(logits, expected) < 0.1


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("assign", [False, True])
def test_files_saved_after_upstreams_bfloat16_cast_load_right(upstream, assign):
    ours, theirs = both(upstream)
    ids = tokens(2, 7)
    expected = ours(ids)
    damaged = {k: v.float() if "freqs" not in k else v for k, v in theirs.to(torch.bfloat16).state_dict().items()}
    assert not damaged["freqs_cis_mla"].is_complex()
    loaded = OpenMythos(tiny_config()).eval()
    if assign:
        loaded = loaded.to("meta")
    loaded.load_state_dict(damaged, strict=True, assign=assign)
    assert torch.equal(loaded.freqs_cis_mla, ours.freqs_cis_mla)
    assert relative(loaded(ids), expected) < 0.1
    assert damaged["freqs_cis_mla"].dtype == torch.bfloat16  # the caller's dict is unchanged


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_prefill_in_chunks_equals_one_prefill(upstream, attn_type):
    ours, theirs = both(upstream, attn_type=attn_type)
    ids = tokens(2, 9)
    whole = ours(ids, kv_cache={})
    assert relative(theirs(ids, kv_cache={}), whole) < 1e-5
    mine, other = {}, {}
    ours(ids[:, :4], kv_cache=mine)
    theirs(ids[:, :4], kv_cache=other)
    assert relative(ours(ids[:, 4:], kv_cache=mine, start_pos=4), whole[:, 4:]) < 1e-5
    with pytest.raises(RuntimeError, match="size of tensor"):  # its mask is as wide as the chunk
        theirs(ids[:, 4:], kv_cache=other, start_pos=4)


def test_rope_key_is_cached_once(upstream):
    """Per token and entry r + rope numbers; upstream holds r + heads * rope."""
    ours, theirs = both(upstream, n_heads=4)
    mine, other = KVCache(capacity=7), {}
    ours(tokens(2, 7), kv_cache=mine)
    theirs(tokens(2, 7), kv_cache=other)
    cfg = ours.cfg
    per_token = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    for key, entry in mine.items():
        assert {n: tuple(t.shape) for n, t in entry.tensors.items()} == {
            "latent": (2, 7, cfg.kv_lora_rank),
            "k_rope": (2, 7, cfg.qk_rope_head_dim),
        }
        assert other[key]["k_rope"].shape == (2, 7, 4, cfg.qk_rope_head_dim)
        assert entry.nbytes() == 2 * 7 * per_token * 4
    assert mine.nbytes() == len(mine) * 2 * 7 * per_token * 4


def test_one_head_with_an_odd_latent_rank(upstream):
    ours, theirs = both(upstream, n_heads=1, kv_lora_rank=7)
    with pytest.raises(RuntimeError, match="divisible by 2"):
        theirs(tokens(1, 1))
    assert relative(ours(tokens(1, 1)), ours(tokens(1, 3)[:, :1].clone())) == 0
    assert relative(ours(tokens(1, 5)), theirs(tokens(1, 5))) < 1e-5


def test_router_bias_far_from_the_logits_keeps_topk_weights_finite(upstream):
    """Experts chosen by the bias alone: renormalizing a full softmax divides 0 by 0."""
    ours, theirs = both(upstream)
    for model in (ours, theirs):
        moe = model.recurrent.block.ffn
        with torch.no_grad():
            moe.router.weight.mul_(2000)
            moe.router_bias.copy_(torch.tensor([1e6, 1e6, 0, 0, 0]))
    assert theirs(tokens(2, 7)).isnan().any()
    assert ours(tokens(2, 7)).isfinite().all()


def test_router_bias_is_updated(upstream):
    ours, theirs = both(upstream)
    for model in (ours, theirs):
        model.train()
        with torch.no_grad():
            model.recurrent.block.ffn.router_bias.zero_()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model(tokens(2, 9)).logsumexp(-1).mean().backward()
        optimizer.step()
    update_router_bias(ours)
    assert not theirs.recurrent.block.ffn.router_bias.any()
    assert ours.recurrent.block.ffn.router_bias.any()


def test_top_k_may_exceed_the_vocabulary(upstream):
    ours, theirs = both(upstream)
    with pytest.raises(RuntimeError, match="out of range"):
        theirs.generate(tokens(1, 4), 1, top_k=50)
    assert ours.generate(tokens(1, 4), 1, top_k=50).shape == (1, 5)


def test_zero_loops_is_an_error(upstream):
    ours, theirs = both(upstream)
    ids = tokens(1, 3)
    assert torch.equal(theirs(ids, n_loops=0), theirs(ids))  # 0 counts as "not given"
    with pytest.raises(ValueError, match="n_loops = 0"):
        ours(ids, n_loops=0)
    with pytest.raises(ValueError, match="n_loops = 0"):
        ours.recurrent(torch.zeros(1, 3, 24), torch.zeros(1, 3, 24), ours.freqs_cis_mla[:3], None, 0)


def test_more_loops_in_decode_than_in_prefill_is_an_error(upstream):
    ours, theirs = both(upstream)
    ids = tokens(1, 5)
    mine, other = {}, {}
    ours(ids[:, :4], n_loops=2, kv_cache=mine)
    theirs(ids[:, :4], n_loops=2, kv_cache=other)
    theirs(ids[:, 4:], n_loops=3, kv_cache=other, start_pos=4)
    assert other["recurrent_loop_2"]["c_kv"].shape[1] == 1  # its third loop saw no key of the prompt
    with pytest.raises(ValueError, match="n_loops = 3: the kv_cache was filled with 2 loops"):
        ours(ids[:, 4:], n_loops=3, kv_cache=mine, start_pos=4)
    fewer = ours(ids[:, 4:], n_loops=1, kv_cache=mine, start_pos=4)
    assert fewer.isfinite().all()
    with pytest.raises(ValueError, match="n_loops = 2: the kv_cache was filled with 1 loops"):
        ours(ids[:, 4:], n_loops=2, kv_cache=mine, start_pos=5)


def test_generation_switches_dropout_off(upstream):
    ours, theirs = both(upstream, dropout=0.5)
    ours.train()
    theirs.train()
    prompt = tokens(1, 4)
    greedy = [theirs.generate(prompt, 8, top_k=1) for _ in range(8)]
    assert any(not torch.equal(ids, greedy[0]) for ids in greedy)
    assert torch.equal(ours.generate(prompt, 8, top_k=1), ours.generate(prompt, 8, top_k=1))
    assert all(module.training for module in ours.modules())


def test_generation_past_max_seq_len_is_a_clear_error(upstream):
    ours, theirs = both(upstream)
    prompt = tokens(1, 20)
    with pytest.raises(RuntimeError, match=r"(?i)sizes? of tensor"):
        theirs.generate(prompt, 6, top_k=5)
    with pytest.raises(ValueError, match="max_new_tokens = 6: must be <= 4"):
        ours.generate(prompt, 6)


@pytest.mark.parametrize("parameter", [-1e30, 1e30, -16.7, -20.0])
def test_the_state_matrix_stays_below_one(upstream, parameter):
    mine, other = LTIInjection(7), upstream.LTIInjection(7)
    for injection in (mine, other):
        torch.nn.init.constant_(injection.log_A, parameter)
    if parameter < -17:
        assert (other.get_A() == 1.0).all()
    assert (mine.get_A() < 1.0).all() and (mine.get_A() >= 0).all()
    assert mine.spectral_radius() < 1.0
    for model in (mine, mine.to(torch.bfloat16), mine.double()):
        assert (model.get_A() < 1.0).all()


def test_config_of_upstream_with_an_impossible_value(upstream):
    upstream.MythosConfig(n_experts=2, n_experts_per_tok=3)
    with pytest.raises(ValueError, match="n_experts_per_tok = 3: must be <= n_experts=2"):
        MythosConfig(n_experts=2, n_experts_per_tok=3)
