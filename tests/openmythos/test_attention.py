import math

import pytest
import torch

from openmythos import CausalMask, GQAttention, MLAttention
from openmythos.layers import apply_rope, rotary_table
from tests.kit.tiny import enliven, relative, tiny_config

KINDS = {"mla": MLAttention, "gqa": GQAttention}


def make(kind: str, **fields):
    cfg = tiny_config(attn_type=kind, n_heads=4, n_kv_heads=2, **fields)
    return enliven(KINDS[kind](cfg)).eval(), rotary_table(cfg.rope_dim, 16, 100.0), torch.randn(2, 5, cfg.dim)


def softmax_rows(q, k, v, visible):
    """Attention one query and head at a time; q, k, v (B, T, H, d) and visible(i) the keys that query i sees."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for head in range(q.shape[2]):
                score = torch.stack([q[b, i, head] @ k[b, j, head] for j in visible(i)]) / math.sqrt(q.shape[-1])
                out[b, i, head] = score.softmax(0) @ v[b, list(visible(i)), head]
    return out.flatten(2)


def test_latent_attention_by_definition():
    attn, table, x = make("mla")
    attn, x = attn.double(), x.double()
    c_q = attn.q_norm(x @ attn.q_down.weight.T)
    q_nope, q_rope = (c_q @ w.weight.T for w in (attn.q_up_nope, attn.q_up_rope))
    latent = x @ attn.kv_down.weight[: attn.kv_lora_rank].T
    shared = apply_rope((x @ attn.kv_down.weight[attn.kv_lora_rank :].T)[:, :, None], table[:5])
    kv = (attn.kv_norm(latent) @ attn.kv_up.weight.T).view(2, 5, 4, 6 + 5)
    q = torch.cat((q_nope.view(2, 5, 4, 6), apply_rope(q_rope.view(2, 5, 4, 4), table[:5])), -1)
    k = torch.cat((kv[..., :6], shared.repeat(1, 1, 4, 1)), -1)
    expected = softmax_rows(q, k, kv[..., 6:], lambda i: range(i + 1)) @ attn.wo.weight.T
    assert relative(attn(x, table[:5], CausalMask(0, 5)), expected) < 1e-12


def test_grouped_query_attention_by_definition():
    attn, table, x = make("gqa")
    attn, x = attn.double(), x.double()
    q, k, v = ((x @ w.weight.T).view(2, 5, -1, 6) for w in (attn.wq, attn.wk, attn.wv))
    q, k = apply_rope(q, table[:5]), apply_rope(k, table[:5])
    k, v = (torch.stack([y[:, :, head // 2] for head in range(4)], dim=2) for y in (k, v))
    expected = softmax_rows(q, k, v, lambda i: range(i + 1)) @ attn.wo.weight.T
    assert relative(attn(x, table[:5], CausalMask(0, 5)), expected) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_mask_nothing_is_hidden(kind):
    attn, table, x = make(kind)
    hidden = torch.zeros(5, 5)
    assert torch.equal(attn(x, table[:5]), attn(x, table[:5], hidden))
    assert relative(attn(x, table[:5]), attn(x, table[:5], CausalMask(0, 5))) > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [3, [3, 1]])
def test_an_additive_tensor_equals_the_causal_mask(kind, start):
    attn, table, x = make(kind)
    caches = {}, {}
    rows = [start] * 2 if isinstance(start, int) else start
    for cache in caches:
        attn(x[:, :3], table[:3], CausalMask(0, 3), cache)
        cache["default"].truncate(rows)
    additive = torch.full((2, 1, 2, 5), float("-inf"))
    for b, first in enumerate(rows):
        for i in range(2):
            additive[b, :, i, : first + i + 1] = 0
    freqs = torch.stack([table[first : first + 2] for first in rows])
    causal = attn(x[:, 3:], freqs, CausalMask(start, 2), caches[0])
    assert torch.equal(causal, attn(x[:, 3:], freqs, additive, caches[1]))
    assert torch.equal(CausalMask(start, 2).additive(5, x).expand(2, 1, 2, 5), additive)


def test_a_single_query_at_the_end_sees_all():
    assert CausalMask(4, 1).sees_all
    assert not CausalMask(4, 2).sees_all and not CausalMask([4, 4], 1).sees_all


@pytest.mark.parametrize("kind", KINDS)
def test_no_key_from_the_future(kind):
    attn, table, x = make(kind)
    x.requires_grad_()
    attn(x, table[:5], CausalMask(0, 5))[:, 2].sum().backward()
    assert x.grad[:, :3].any() and not x.grad[:, 3:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_only_while_training(kind):
    attn, table, x = make(kind, dropout=0.5)
    assert torch.equal(attn(x, table[:5]), attn(x, table[:5]))
    attn.train()
    assert not torch.equal(attn(x, table[:5]), attn(x, table[:5]))
