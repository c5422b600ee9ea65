"""Byte models of the laboratory: the same from the same settings, and kept for the next who asks."""

import pytest
import torch

from openmythos.lab import text
from openmythos.lab.experiments.cache_loops import decode
from openmythos.lab.experiments.stability import state_norms

TRAINING = {**text.SMOKE_TRAINING, "steps": 3, "seed": 0}


def no_tick(done, of):
    pass


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_equal_settings_give_equal_weights_and_leave_the_random_state():
    torch.manual_seed(1)
    first = text.trained(TRAINING, no_tick)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    second = text.trained(TRAINING, no_tick)
    assert same(weights(first.model), weights(second.model)) and first.record == second.record
    other = text.trained({**TRAINING, "seed": 1}, no_tick)
    assert not same(weights(first.model), weights(other.model))


def test_a_kept_model_is_not_trained_again(monkeypatch, tmp_path):
    monkeypatch.setenv(text.KEPT, str(tmp_path))
    first = text.shared(TRAINING, no_tick)
    kept = list(tmp_path.iterdir())
    assert [file.name for file in kept] == [f"{text.identity(TRAINING)}.pt"]

    def fail(*_, **__):
        raise AssertionError("it is trained again")

    monkeypatch.setattr(text, "Trainer", fail)
    second = text.shared(TRAINING, no_tick)
    assert same(weights(first.model), weights(second.model)) and first.record == second.record
    assert not second.model.training
    read = [text.loss_of(one.model, TRAINING, {"rows": 4, "batches": 1}) for one in (first, second)]
    assert read[0] == read[1]
    with pytest.raises(AssertionError, match="again"):
        text.shared({**TRAINING, "steps": 4}, no_tick)
    with pytest.raises(AssertionError, match="again"):
        text.trained(TRAINING, no_tick)
    monkeypatch.delenv(text.KEPT)
    with pytest.raises(AssertionError, match="again"):
        text.shared(TRAINING, no_tick)


def test_identity_depends_on_every_setting():
    names = {text.identity(TRAINING), text.identity({**TRAINING, "fast": False})}
    names |= {text.identity(text.changed(TRAINING, model={"dim": 64})), text.identity({**TRAINING, "seed": 1})}
    assert len(names) == 4
    assert text.identity(dict(reversed(TRAINING.items()))) in names


def test_changed_reaches_into_dicts_and_leaves_the_original():
    tree = {"a": {"b": 1, "c": 2}, "d": 3}
    assert text.changed(tree, a={"b": 4}, d=None) == {"a": {"b": 4, "c": 2}, "d": None}
    assert tree == {"a": {"b": 1, "c": 2}, "d": 3}


def test_halves_of_the_held_out_text_are_disjoint():
    whole = text.corpus().validation
    first, second = (text.text(TRAINING, "held_out", part=(i, 2)).text for i in range(2))
    assert torch.equal(torch.cat((first, second)), whole[: len(first) + len(second)])
    assert len(first) == len(second) >= len(whole) // 2


def test_batches_of_shards_are_dealt_out():
    part = text._Part(list(range(10)), 1, 2)
    assert [part[step] for step in range(3)] == [1, 3, 5]


def test_missing_shards_are_an_error_that_names_them(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        text.text({**TRAINING, "shards": str(tmp_path / "nowhere")}, "train")


def test_one_loop_has_one_latent():
    model = text.build_model(TRAINING).eval()
    ids, targets = text.text(TRAINING, "held_out", 2)[0]
    each = decode(model, ids, targets, 1, "each")
    assert torch.equal(each, decode(model, ids, targets, 1, "last"))
    assert torch.equal(each, decode(model, ids, targets, 1, "first"))


def test_keeping_all_loops_is_no_choice():
    """What `first` reads, checked on the cache itself: later loops hold the first one's keys of every token."""
    from openmythos.cache import KVCache
    from openmythos.lab.experiments.cache_loops import _first_alone

    model = text.build_model(TRAINING).eval()
    cache = KVCache(8)
    with torch.no_grad():
        for i in range(3):
            model(torch.tensor([[i]]), n_loops=3, kv_cache=cache, start_pos=i)
            _first_alone(cache, 3)
    first = cache["recurrent_loop_0"].tensors["k"][:, :3]
    assert all(torch.equal(cache[f"recurrent_loop_{t}"].tensors["k"][:, :3], first) for t in (1, 2))


def test_state_norms_are_those_of_the_loop():
    model = text.build_model({**TRAINING, "model": {**TRAINING["model"], "injection": "add"}}).eval()
    ids, _ = text.text(TRAINING, "held_out", 2)[0]
    seen = []
    model.recurrent.block.register_forward_hook(lambda module, args, out: seen.append(out.norm(dim=-1).mean().item()))
    assert state_norms(model, ids, 4) == pytest.approx(seen) and len(seen) == 4  # with add the block gives the state
