import copy
import itertools
import pickle

import pytest
import torch

from openmythos import KVCache, LayerCache
from tests.kit.tiny import relative, tiny_model, tokens

KINDS = ["mla", "gqa"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("halting", ["evolve", "freeze", "off"])
def test_every_way_to_cut_a_prompt_gives_the_same_logits(kind, halting):
    model = tiny_model(attn_type=kind, halting=halting)
    ids = tokens(2, 9)
    whole = model(ids)
    with torch.no_grad():
        for cuts, make in itertools.product(([9], [1] * 9, [4, 5], [3, 1, 3, 2]), (dict, KVCache, lambda: KVCache(9))):
            cache = make()
            parts, start = [], 0
            for n in cuts:
                parts.append(model(ids[:, start : start + n], kv_cache=cache, start_pos=start))
                start += n
            assert relative(torch.cat(parts, 1), whole) < 1e-5


def test_preallocated_growing_and_plain_are_equal():
    model = tiny_model()
    ids = tokens(2, 9)
    caches = {}, KVCache(), KVCache(capacity=24)
    with torch.no_grad():
        for start in range(9):
            first, *others = (model(ids[:, start : start + 1], kv_cache=c, start_pos=start) for c in caches)
            assert all(relative(other, first) < 1e-6 for other in others)
    for key, entry in caches[0].items():
        for cache in caches[1:]:
            for name, held in entry.tensors.items():
                assert relative(held[:, :9], cache[key].tensors[name][:, :9]) < 1e-6


def test_memory():
    model = tiny_model()
    roomy, growing = KVCache(capacity=20), KVCache()
    with torch.no_grad():
        for start in range(9):
            token = tokens(1, 1, seed=start)
            model(token, kv_cache=roomy, start_pos=start)
            model(token, kv_cache=growing, start_pos=start)
            if start == 0:
                places = {key: entry.tensors["latent"].data_ptr() for key, entry in roomy.items()}
    assert places == {key: entry.tensors["latent"].data_ptr() for key, entry in roomy.items()}  # never moved
    assert roomy.nbytes() == 6 * 20 * (10 + 4) * 4  # prelude, 4 loops, coda
    assert {entry.capacity for entry in growing.values()} == {16}  # 1, 2, 4, 8, 16
    assert roomy.lengths == growing.lengths == [9]
    assert KVCache().lengths == [] and KVCache().nbytes() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("halting", ["evolve", "freeze"])
def test_rows_of_different_length(kind, halting):
    """Padded prompts in one batch, then ragged chunks, equal each row alone."""
    model = tiny_model(attn_type=kind, halting=halting)
    lengths = [3, 7, 5]
    rows = [tokens(1, n + 4, seed=n) for n in lengths]
    ids = torch.zeros(3, 7, dtype=torch.int64)
    for b, n in enumerate(lengths):
        ids[b, :n] = rows[b][0, :n]
    alone = [model(row) for row in rows]
    for cache in ({}, KVCache(capacity=24)):
        with torch.no_grad():
            logits = model(ids, kv_cache=cache)
            for entry in cache.values():
                entry.truncate(lengths)
            for b, n in enumerate(lengths):
                assert relative(logits[b, :n], alone[b][0, :n]) < 1e-5
            done = 0
            for chunk in (1, 2, 1):
                new = torch.cat([row[:, n + done : n + done + chunk] for row, n in zip(rows, lengths)])
                start = torch.tensor(lengths) + done
                logits = model(new, kv_cache=cache, start_pos=start if done else start.tolist())
                for b, n in enumerate(lengths):
                    assert relative(logits[b], alone[b][0, n + done : n + done + chunk]) < 1e-5
                done += chunk


def test_start_positions_without_a_cache():
    """Only rotary positions move, and latent attention sees distances alone: the logits are those of position 0."""
    model = tiny_model().double()
    ids = tokens(2, 5)
    expected = model(ids)
    assert relative(model(ids, start_pos=7), expected) < 1e-6
    assert relative(model(ids, start_pos=[3, 9]), expected) < 1e-6
    assert relative(model(ids, start_pos=torch.tensor(2)), expected) < 1e-6


def test_truncate_forgets():
    model = tiny_model()
    ids = tokens(2, 9)
    cache = KVCache()
    model(ids, kv_cache=cache)
    cache.truncate([4, 4])
    assert cache.lengths == [4, 4]
    other = tokens(2, 3, seed=9)
    expected = model(torch.cat((ids[:, :4], other), 1))[:, 4:]
    assert relative(model(other, kv_cache=cache, start_pos=4), expected) < 1e-5
    cache.truncate([0, 0])
    assert relative(model(ids, kv_cache=cache), model(ids)) < 1e-5
    for bad in ([10, 9], [-1, 2], [3]):
        with pytest.raises(ValueError, match="lengths = "):
            next(iter(cache.values())).truncate(bad)


def test_truncate_after_a_shallow_step_restores_the_depth():
    model = tiny_model()
    ids = tokens(1, 6)
    cache = KVCache()
    model(ids[:, :4], kv_cache=cache)
    model(ids[:, 4:5], kv_cache=cache, start_pos=4, n_loops=2)
    with pytest.raises(ValueError, match="n_loops = 4: the kv_cache was filled with 2 loops"):
        model(ids[:, 5:], kv_cache=cache, start_pos=5)
    cache.truncate([4])
    assert relative(model(ids[:, 4:], kv_cache=cache, start_pos=4), model(ids)[:, 4:]) < 1e-5


def test_gradients_reach_the_new_tokens_only():
    model = tiny_model()
    ids = tokens(2, 6)
    cache = {}
    with torch.no_grad():
        model(ids[:, :4], kv_cache=cache)
    logits = model(ids[:, 4:], kv_cache=cache, start_pos=4)
    logits.sum().backward()
    touched = model.embed.weight.grad.abs().sum(1)  # also tied with the head
    assert touched.isfinite().all() and model.recurrent.block.attn.kv_up.weight.grad.any()
    assert not any(t.requires_grad for entry in cache.values() for t in entry.tensors.values())


@pytest.mark.parametrize("trained", ["kv_up", "wq", "embed"])
def test_backward_after_the_cache_has_moved_on(trained):
    model = tiny_model(attn_type="gqa" if trained == "wq" else "mla")
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    ids = tokens(1, 6)
    cache = KVCache(capacity=6)
    first = model(ids[:, :4], kv_cache=cache)
    second = model(ids[:, 4:], kv_cache=cache, start_pos=4)
    (first.sum() + second.sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def snapshot(cache):
    return {k: (list(e.lengths), {n: t.clone() for n, t in e.tensors.items()}) for k, e in cache.items()}


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(ids=tokens(3, 1)), r"start_pos = \[4, 4, 4\]: the kv_cache holds \[4, 4\]"),
        (dict(start_pos=3), r"start_pos = \[3, 3\]: the kv_cache holds \[4, 4\] tokens per row"),
        (dict(start_pos=[4, 5]), r"start_pos = \[4, 5\]"),
        (dict(start_pos=0), r"start_pos = \[0, 0\]"),
        (dict(n_loops=5), r"n_loops = 5: the kv_cache was filled with 4 loops"),
        (dict(model=dict(dtype=torch.bfloat16)), r"kv_cache.*float32.*bfloat16"),
        (dict(model=dict(attn_type="gqa")), r"kv_cache.*'latent'.*new tokens.*'k'"),
        (dict(model=dict(kv_lora_rank=6)), r"kv_cache.*\(10,\).*\(6,\)"),
        (dict(ids=tokens(2, 21)), r"input_ids: 21 tokens from position 4 end past max_seq_len = 24"),
        (dict(ids=torch.full((2, 1), 37)), r"input_ids: found 37 .. 37: must be in 0 .. 36"),
    ],
)
@pytest.mark.parametrize("make", [dict, KVCache, lambda: KVCache(capacity=24)])
def test_refused_calls_leave_the_cache_as_it_was(call, message, make):
    cache = make()
    model = tiny_model()
    model(tokens(2, 4), kv_cache=cache)
    before = snapshot(cache)
    other = dict(call.get("model", {}))
    dtype = other.pop("dtype", torch.float32)
    if "model" in call:
        model = tiny_model(**other).to(dtype)
    options = {"start_pos": 4, **{k: v for k, v in call.items() if k in ("start_pos", "n_loops")}}
    with pytest.raises(ValueError, match=message):
        model(call.get("ids", tokens(2, 1)), kv_cache=cache, **options)
    after = snapshot(cache)
    assert before.keys() == after.keys()
    for key, (lengths, tensors) in before.items():
        assert after[key][0] == lengths
        assert all(torch.equal(after[key][1][name], t) for name, t in tensors.items())


def test_stale_numbers_behind_a_row_do_not_matter():
    entry = LayerCache()
    entry.append(k=torch.ones(2, 3, 1))
    entry.truncate([1, 3])
    assert not entry.uniform
    (seen,) = entry.append(k=torch.full((2, 1, 1), 2.0))
    assert seen[0, :2, 0].tolist() == [1, 2] and seen[1, :, 0].tolist() == [1, 1, 1, 2]
    assert entry.lengths == [2, 4]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copied_cache_goes_its_own_way(clone):
    model = tiny_model()
    ids = tokens(2, 6)
    cache = KVCache(capacity=8)
    with torch.no_grad():
        model(ids[:, :4], kv_cache=cache)
        branch = clone(cache)
        model(tokens(2, 2, seed=5), kv_cache=branch, start_pos=4)
        assert relative(model(ids[:, 4:], kv_cache=cache, start_pos=4), model(ids)[:, 4:]) < 1e-5
    assert branch.capacity == 8
