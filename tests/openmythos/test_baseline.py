import pytest
import torch

from openmythos import DenseConfig, DenseTransformer, KVCache
from openmythos.layers import Expert
from tests.kit.tiny import SMALL, enliven, relative, tokens


def make(**fields) -> DenseTransformer:
    return enliven(DenseTransformer(DenseConfig(**{**SMALL, "n_layers": 3, **fields}))).eval()


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_layers_one_after_another(kind):
    model = make(attn_type=kind)
    ids = tokens(2, 6)
    table = model.freqs_cis_mla if kind == "mla" else model.freqs_cis
    mask = torch.full((6, 6), float("-inf")).triu(1)
    x = model.embed(ids)
    for block in model.layers:
        assert isinstance(block.ffn, Expert)
        x = x + block.attn(block.attn_norm(x), table[:6], mask)
        x = x + block.ffn(block.ffn_norm(x))
    assert relative(model(ids), model.norm(x) @ model.embed.weight.T) < 1e-6
    assert len(model.layers) == 3


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_cached_decoding(kind):
    model = make(attn_type=kind)
    ids = tokens(2, 8)
    whole = model(ids)
    for cuts in ([1] * 8, [3, 5], [4, 1, 3]):
        cache, parts, start = KVCache(), [], 0
        for n in cuts:
            parts.append(model(ids[:, start : start + n], kv_cache=cache, start_pos=start))
            start += n
        assert relative(torch.cat(parts, 1), whole) < 1e-5
    with pytest.raises(ValueError, match=r"start_pos = \[3, 3\]"):
        model(ids[:, :1], kv_cache=cache, start_pos=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_trains_in_other_precisions(dtype):
    model = make()
    expected = model(tokens(2, 6))
    model = model.to(dtype)
    logits = model(tokens(2, 6))
    logits.logsumexp(-1).mean().backward()
    assert logits.dtype == dtype and relative(logits, expected) < 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_parameters_are_counted_once():
    model = make()
    assert model.head.weight is model.embed.weight
    assert sum(p is model.embed.weight for p in model.parameters()) == 1
