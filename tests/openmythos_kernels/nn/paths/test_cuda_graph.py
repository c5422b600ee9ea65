"""Decoding by a CUDA graph, on the host: a stand-in for the graph runs the captured step again."""

import contextlib
import copy

import pytest
import torch

from openmythos import KVCache
from openmythos_kernels import accelerate
from openmythos_kernels.nn.lengths import provider
from openmythos_kernels.nn.paths.cuda_graph import TokenGraph, _obstacle, token_step
from openmythos_kernels.runtime.backends import Choice
from tests.kit.tiny import tiny_model, tokens

STEPS = 6


class Recorded:
    """Stands for a CUDA graph, whose tensors would be on a GPU."""

    def replay(self):
        held, step = self.graph._lengths.tensor.tolist(), self.graph
        for entry in step._entries.values():
            entry.lengths = list(held)
        step._logits.copy_(token_step(step._model, step._ids, step._lengths, held, step._n_loops, step._cache))


@pytest.fixture
def graphs(monkeypatch):
    """The captured graphs. A capture computes nothing, so the fixture undoes what the captured step appended."""
    made = []

    @contextlib.contextmanager
    def capturing(graph):
        made.append(graph)
        yield
        graph.graph._lengths.tensor -= 1

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    capture = TokenGraph._capture

    def known(self, ids, held):
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: _of(self))
        capture(self, ids, held)

    monkeypatch.setattr(TokenGraph, "_capture", known)
    return made


def _of(step):
    graph = Recorded()
    graph.graph = step
    return graph


def models(layers=False, **fields):
    """layers: whether whole layers are ops. On a GPU they are with OPENMYTHOS_UNPROVEN=1, and else attention alone."""
    reference = tiny_model(halt=0.3, **fields).eval()
    return reference, accelerate(copy.deepcopy(reference), block=layers, loop=layers).eval()


def filled(model, ids, capacity, loops=3):
    cache = KVCache(capacity)
    model(ids, n_loops=loops, kv_cache=cache)
    return cache


def decoder(model, cache, loops=3):
    return TokenGraph(model, cache, model.decoder(cache, n_loops=loops), loops)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [5 + STEPS, 8], ids=["room", "the cache grows"])
@pytest.mark.parametrize("lengths", [[5, 5], [5, 2]], ids=["equal rows", "ragged rows"])
@pytest.mark.parametrize("layers", [False, True], ids=["attention", "whole layers"])
def test_logits_equal_the_models(graphs, lengths, capacity, layers):
    reference, fast = models(layers)
    prompt, more = tokens(2, 5), tokens(2, STEPS, seed=1)
    caches = [filled(model, prompt, capacity) for model in (reference, fast)]
    for cache in caches:
        cache.truncate(lengths)
    plain, graph = reference.decoder(caches[0], n_loops=3), decoder(fast, caches[1])
    for t in range(STEPS):
        torch.testing.assert_close(graph(more[:, t : t + 1]), plain(more[:, t : t + 1]), rtol=1e-4, atol=1e-5)
        assert caches[0].lengths == caches[1].lengths
    assert not graph.refused
    assert len(graphs) == (1 if capacity > 8 else 2)


@torch.no_grad()
def test_decoding_continues_after_truncate(graphs):
    reference, fast = models()
    more, results = tokens(2, STEPS, seed=1), []
    for model, made in ((reference, lambda m, c: m.decoder(c, n_loops=3)), (fast, decoder)):
        cache = filled(model, tokens(2, 5), 16)
        decode = made(model, cache)
        for t in range(3):
            decode(more[:, t : t + 1])
        cache.truncate([6, 4])
        results.append(decode(more[:, 3:4]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@torch.no_grad()
def test_moved_weights_cause_a_new_capture(graphs):
    _, fast = models()
    cache = filled(fast, tokens(2, 5), 16)
    decode, ids = decoder(fast, cache), tokens(2, 1)
    before = [decode(ids) for _ in range(3)][-1]
    fast.head.weight.data = fast.head.weight.data * 2  # tied to the embedding
    cache.truncate([7, 7])
    assert not torch.allclose(decode(ids), before)
    assert len(graphs) == 2


@torch.no_grad()
def test_a_step_that_the_host_steers_is_not_captured(graphs):
    """A cache that keeps one latent of all loops: its layers are read more often than it has entries."""
    reference, fast = models()
    caches = [KVCache(16, loops="last") for _ in range(2)]
    more = tokens(2, STEPS, seed=1)
    with torch.no_grad():
        for model, cache in zip((reference, fast), caches):
            model(tokens(2, 5), kv_cache=cache, n_loops=3)
        plain, graph = reference.decoder(caches[0], n_loops=3), decoder(fast, caches[1])
        for t in range(STEPS):
            torch.testing.assert_close(graph(more[:, t : t + 1]), plain(more[:, t : t + 1]), rtol=1e-4, atol=1e-5)
    assert "kept by the host" in graph.refused


def test_where_positions_freeze_there_is_no_graph(graphs):
    _, fast = models(halting="freeze")
    assert "freeze" in _obstacle(fast)


def test_errors_equal_the_models(graphs):
    _, fast = models()
    with torch.no_grad():
        cache = filled(fast, tokens(2, 5), 16)
        decode = decoder(fast, cache)
        with pytest.raises(ValueError, match="start_pos"):
            decode(tokens(3, 1))
        with pytest.raises(ValueError, match="n_loops = 4"):
            decoder(fast, cache, 4)(tokens(2, 1))


def test_only_gpus_capture():
    _, fast = models()
    assert fast.backend() == Choice("cpu")
    assert not isinstance(fast.decoder(KVCache()), TokenGraph)
    assert provider.get() is None
