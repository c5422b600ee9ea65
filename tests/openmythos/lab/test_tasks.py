"""The tasks' answers, found again by walking the edges that the tokens say."""

import numpy as np
import pytest
import torch

from openmythos import MythosConfig, OpenMythos
from openmythos.lab.tasks.halting import reached
from openmythos.lab.tasks.pointers import Vocabulary, chains, cycle


def edges(words, ids):
    """One dict per sequence: node -> node."""
    found = []
    for row in ids.tolist():
        pairs = [divmod(token - words.nodes, words.nodes) for token in row if words.nodes <= token < words.mark]
        found.append(dict(pairs))
        assert len(pairs) == len(found[-1]), "every node has one edge"
    return found


def walked(follow, node, hops):
    path = [node]
    for _ in range(hops):
        path.append(follow[path[-1]])
    return path


@pytest.mark.parametrize("unary", [False, True])
def test_a_cycle_goes_through_all_nodes(unary):
    words, hops = Vocabulary(7), 4
    made = cycle(words, 5, hops, np.random.default_rng(0), unary=unary)
    assert made.ids.shape == (5, 7 + 4 * unary + 7) and made.asked == 7
    for follow, ids, path, answers in zip(edges(words, made.ids), made.ids, made.path, made.answers):
        assert len(set(walked(follow, 0, 6))) == 7
        assert sorted(ids[-7:].tolist()) == list(range(7)), "every node is asked for"
        assert [walked(follow, node, hops) for node in ids[-7:].tolist()] == path.tolist()
        assert answers.tolist() == path[:, hops].tolist()
        assert (ids == words.mark).sum() == 4 * unary


def test_sequences_that_say_their_hops():
    words = Vocabulary(5, hops=3)
    made = cycle(words, 40, 3, np.random.default_rng(1), asks=True)
    assert made.ids.shape == (40, 5 + 1 + 5) and int(made.ids.max()) < words.size
    assert set(made.hops.flatten().tolist()) == {1, 2, 3}
    for follow, ids, hops, answers in zip(edges(words, made.ids), made.ids, made.hops, made.answers):
        assert set(hops.tolist()) == {int(ids[5]) - words.mark}
        for node, k, answer in zip(ids[-5:].tolist(), hops.tolist(), answers.tolist()):
            assert walked(follow, node, k)[-1] == answer
    early = reached(made, 2)
    assert early.equal(made.path.gather(-1, made.hops.clamp(max=2)[..., None])[..., 0])
    assert reached(made, 9).equal(made.answers)


def test_chains_end_in_a_node_that_points_to_itself():
    words = Vocabulary(12)
    made = chains(words, 60, (5, 3, 2), 6, np.random.default_rng(2))
    assert set(made.hops.flatten().tolist()) == {1, 2, 3, 4}
    for follow, ids, path, hops in zip(edges(words, made.ids), made.ids, made.path, made.hops):
        ends = [node for node in follow if follow[node] == node]
        assert len(ends) == 3 + 12 - 10
        for node, way, k in zip(ids[-6:].tolist(), path.tolist(), hops.tolist()):
            assert way == walked(follow, node, len(way) - 1)
            assert way[k] in ends and way[k - 1] not in ends, "k is the distance of the end"


def test_a_seed_is_the_same_sequences():
    words = Vocabulary(7)
    made = [cycle(words, 3, 2, np.random.default_rng(seed)).ids for seed in (3, 3, 4)]
    assert made[0].equal(made[1]) and not made[0].equal(made[2])


def test_tokens_begin_as_sums():
    words = Vocabulary(5, hops=2)
    model = OpenMythos(MythosConfig(vocab_size=words.size, dim=16, n_heads=2, n_kv_heads=2, attn_type="gqa"))
    words.prepare(model, torch.Generator().manual_seed(0))
    w = model.embed.weight
    edge = lambda a, b: w[words.edge(np.array(a), np.array(b))]  # noqa: E731
    assert torch.allclose(edge(1, 3) - edge(1, 2), w[3] - w[2]) and torch.allclose(
        edge(1, 3) - edge(4, 3), edge(1, 0) - edge(4, 0)
    )
    assert model.head.weight is model.embed.weight
    assert model(torch.arange(6)[None]).shape == (1, 6, 5), "answers are nodes"
