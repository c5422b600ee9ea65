"""Tensor masks that are causal: which are recognized, how often they are read, and that results stay the same."""

import copy

import pytest
import torch

from openmythos.attention import CausalMask
from openmythos.cache import KVCache
from openmythos_kernels import accelerate
from openmythos_kernels.nn import causal
from openmythos_kernels.nn.causal import recognised
from openmythos_kernels.nn.paths import mla_attention
from tests.kit.tiny import tiny_model


def additive(tokens, start=0, dtype=torch.float32):
    return torch.full((1, 1, tokens, start + tokens), float("-inf"), dtype=dtype).triu(start + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [0, 3])
def test_causal_masks_are_recognized(dtype, start):
    mask = additive(5, start, dtype)
    for form in (mask, mask[0, 0], mask.expand(2, 3, -1, -1), mask.repeat(2, 1, 1, 1)):
        found = recognised(form, 5, start + 5)
        assert isinstance(found, CausalMask) and (found.start, found.tokens) == (start, 5)


def changed(at, value):
    mask = additive(5)
    mask[0, 0][at] = value
    return mask


OTHERS = {
    "a key hidden": changed((3, 1), float("-inf")),
    "a key shown": changed((3, 4), 0.0),
    "a bias": changed((3, 3), 0.1),
    "nearly hidden": additive(5).clamp(min=-1e9),
    "nan": changed((0, 4), float("nan")),
    "booleans": additive(5) == 0,
    "the last row": changed((4, 0), float("-inf")),
    "one row of a batch": torch.cat((additive(5), changed((2, 0), -1.0))),
    "other keys": additive(5, 1),
    "a key more": torch.full((1, 1, 5, 6), float("-inf")).triu(1),
    "learned": additive(5).requires_grad_(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_are_not_recognized(name):
    assert recognised(OTHERS[name], 5, 5) is OTHERS[name]


def test_a_mask_is_read_once_and_again_after_it_has_changed(monkeypatch):
    looks = []
    monkeypatch.setattr(causal, "_is_causal", lambda mask, start: looks.append(mask) or True)
    mask = additive(5)
    for _ in range(3):
        assert isinstance(recognised(mask, 5, 5), CausalMask)
    assert len(looks) == 1
    mask[0, 0, 2, 1] = -1.0
    monkeypatch.undo()
    assert recognised(mask, 5, 5) is mask


def test_masks_are_not_kept_alive():
    for _ in range(100):
        recognised(additive(5), 5, 5)
    assert len(causal._looks) <= causal._KEPT


def test_no_call_waits_for_a_late_answer():
    """On a GPU, the answer is used once it has arrived; until then the mask counts as not recognized."""

    class Arrived:
        there = False

        def query(self):
            return self.there

    look = causal._Look(additive(5), 0)
    look._answer, look._flag, look._arrived = None, torch.tensor(True), Arrived()
    assert not look.answer()
    Arrived.there = True
    assert look.answer() and look._flag is None and look.answer()


@pytest.mark.parametrize("name", ["causal", "a key hidden"])
def test_layers_compute_the_same_with_a_tensor_mask(name):
    model = tiny_model()
    fast = accelerate(copy.deepcopy(model))
    x, freqs = torch.randn(2, 5, 24), model.freqs_cis_mla[:5]
    mask = additive(5) if name == "causal" else OTHERS[name]
    for part in ("prelude.0.attn", "prelude.0", "recurrent.block"):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                a, b = (m.get_submodule(part)(x, freqs, mask) for m in (model, fast))
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            a, b = (m.recurrent(x, x, freqs, mask) for m in (model, fast))
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_with_a_cache_the_mask_covers_all_cached_keys():
    model = tiny_model()
    fast = accelerate(copy.deepcopy(model))
    x, caches = torch.randn(2, 9, 24), (KVCache(), KVCache())
    for first, end in ((0, 4), (4, 9)):
        mask, freqs = additive(end - first, first), model.freqs_cis_mla[first:end]
        with torch.no_grad():
            a, b = (
                m.prelude[0].attn(x[:, first:end], freqs, mask, cache, "k") for m, cache in zip((model, fast), caches)
            )
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_upstreams_mask_is_passed_as_a_causal_mask(monkeypatch):
    model = accelerate(tiny_model())
    attention, taken = model.prelude[0].attn, []
    monkeypatch.setattr(mla_attention, "run", lambda call: taken.append(call.causal))
    attention(torch.randn(2, 5, 24), model.freqs_cis_mla[:5], additive(5))
    assert isinstance(taken[0], CausalMask)
