import copy
import itertools
import pickle

import pytest
import torch

from openmythos import KVCache, LayerCache
from openmythos_kernels import accelerate
from tests.kit.tiny import SMALL, enliven, relative, tiny_model, tokens
from tests.kit.upstream import load_upstream

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
    """Padded prompts in one batch, then chunks at different positions, equal each row alone."""
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
    """Rotary attention scores depend on distances alone: the logits are those of position 0."""
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


# ---- caches of open-mythos


def upstream_model(**fields):
    theirs = load_upstream()
    return enliven(theirs.OpenMythos(theirs.MythosConfig(**{**SMALL, **fields}))).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_cache_that_open_mythos_filled_goes_on(kind, fast, chunk):
    upstream, ids = upstream_model(attn_type=kind), tokens(2, 10)
    theirs = {}
    with torch.no_grad():
        want = upstream(ids)
        upstream(ids[:, :4], kv_cache=theirs)
        assert {type(entry) for entry in theirs.values()} == {dict}
        model = accelerate(upstream) if fast else tiny_model(attn_type=kind)
        for start in range(4, 10, chunk):
            new = ids[:, start : start + chunk]
            assert relative(model(new, kv_cache=theirs, start_pos=start), want[:, start : start + chunk]) < 1e-5
    assert {type(entry) for entry in theirs.values()} == {LayerCache}


def test_a_cache_that_open_mythos_filled_is_checked():
    upstream, model, ids = upstream_model(), tiny_model(), tokens(2, 6)
    theirs = {}
    with torch.no_grad():
        upstream(ids[:, :4], kv_cache=theirs, n_loops=2)
        with pytest.raises(ValueError, match=r"start_pos = \[3, 3\]: the kv_cache holds \[4, 4\]"):
            model(ids[:, 4:], kv_cache=theirs, start_pos=3)
        with pytest.raises(ValueError, match="n_loops = 4: the kv_cache was filled with 2 loops"):
            model(ids[:, 4:], kv_cache=theirs, start_pos=4)
        theirs["prelude_0"]["k_rope"][:, :, 1] += 1  # no longer one key for all heads
        for bad in ({"k": ids, "v": ids}, theirs["prelude_0"]):
            with pytest.raises(ValueError, match="an entry holds"):
                model.prelude[0].attn(torch.randn(2, 1, 24), model.freqs_cis_mla[:1], kv_cache={"default": bad})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fast", [False, True])
def test_entries_are_read_by_the_names_of_open_mythos(kind, fast):
    upstream, ids = upstream_model(attn_type=kind), tokens(2, 5)
    theirs, ours = {}, {}
    model = accelerate(tiny_model(attn_type=kind)) if fast else tiny_model(attn_type=kind)
    with torch.no_grad():
        for cache, one in ((theirs, upstream), (ours, model)):
            one(ids[:, :4], kv_cache=cache)
            one(ids[:, 4:], kv_cache=cache, start_pos=4)
    assert theirs.keys() == ours.keys()
    for key, want in theirs.items():
        entry = ours[key]
        assert set(entry) == set(want) == set(entry.keys()) == set(dict(entry)) == {name for name, _ in entry.items()}
        assert all(name in entry for name in want) and "other" not in entry and entry.get("other") is None
        attn = model.get_submodule("recurrent.block" if "loop" in key else key.replace("_", ".")).attn
        for name, tensor in want.items():
            held = attn.kv_norm(tensor) if name == "c_kv" else tensor
            shape = (2, 5, 1, 4) if name == "k_rope" else tensor.shape
            assert entry[name].shape == shape and relative(entry[name].expand_as(tensor), held) < 1e-5
        with pytest.raises(KeyError):
            entry["other"]
    assert not LayerCache().keys()


# ---- rows that share memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("capacity", [5, 20])
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("names", [("latent", "k_rope", "k", "v"), ("k_rope", "v")])
def test_one_prompt_expanded_to_a_batch(kind, fast, capacity, chunk, names):
    model, prompt, new = tiny_model(attn_type=kind), tokens(1, 5), tokens(3, 4, seed=2)
    want = model(torch.cat((prompt.expand(3, -1), new), 1))[:, 5:]
    model = accelerate(model) if fast else model
    cache = KVCache(capacity=capacity)
    with torch.no_grad():
        model(prompt, kv_cache=cache)
        for entry in cache.values():
            many = {name: x.expand(3, *x.shape[1:]) for name, x in entry.tensors.items()}
            entry.tensors = {name: x if name in names else x.clone() for name, x in many.items()}
            entry.lengths = [5] * 3
        got = [model(new[:, i : i + chunk], kv_cache=cache, start_pos=5 + i) for i in range(0, 4, chunk)]
    assert relative(torch.cat(got, 1), want) < 1e-5
