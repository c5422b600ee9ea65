"""Self-speculation is lossless: greedy tokens are those of plain decoding, sampled ones have its distribution."""

import pytest
import torch

from openmythos.config import HALTINGS
from openmythos.generate import distribution
from openmythos_kernels.serve import Engine, speculative_stream
from openmythos_kernels.serve.request import checked
from openmythos_kernels.serve.speculation import _Stream
from openmythos_kernels.serve.weights import Weights
from tests.kit.tiny import tokens

PAIRS = [(1, 1), (1, 3), (2, 2), (3, 5), (4, 1), (2, 0)]


def stream_of(model, pair, **options):
    """A stream and its first token."""
    asked = dict(max_new_tokens=12, temperature=0, top_k=0, top_p=1.0, eos=None, seed=0, n_loops=None) | options
    stream = _Stream(
        weights := Weights(model), checked(model.cfg, weights.device, tokens(4), exit=None, **asked), *pair
    )
    return stream, stream.begin()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("halting", HALTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_greedy_tokens_are_those_of_plain_decoding(seed, halting, pair, served):
    fields = [{}, dict(core_layers=2, coda_layers=2, act_remainder="last"), dict(act_threshold=0.5, h0="zeros")][seed]
    model = served(halting=halting, seed=seed, **fields)
    for n in (1, 6):
        prompt = tokens(n, seed=seed)
        expected = Engine(model, slots=1).submit(prompt, 14, temperature=0).result().tolist()
        assert list(speculative_stream(model, prompt, 14, speculate=pair, temperature=0)) == expected
        eos = expected[4]
        found = list(speculative_stream(model, prompt, 14, speculate=pair, temperature=0, eos=eos))
        assert found == expected[: expected.index(eos) + 1]
    assert list(speculative_stream(model, prompt, 0, speculate=pair)) == []


def test_it_counts_what_became_of_the_drafts(served):
    stream = speculative_stream(served(), tokens(4), 14, speculate=(2, 3), temperature=0)
    assert next(stream) in range(37) and stream.rounds == stream.drafted == 0  # the prompt gives the first token
    assert len(list(stream)) == 13
    assert 13 - stream.rounds <= stream.accepted <= stream.drafted <= 3 * stream.rounds
    assert stream.accepted + stream.rounds in (13, 13 + 1)
    exact = speculative_stream(
        served(halting="off"), tokens(4), 13, speculate=(4, 3), temperature=0
    )  # drafts by all loops
    assert len(list(exact)) == 13 and (exact.rounds, exact.drafted, exact.accepted) == (3, 9, 9)


@pytest.mark.parametrize("halting", HALTINGS)
def test_caches_and_logits_are_those_of_plain_decoding(halting, served, seen):
    """To the bit: every latent of a kept token, inside the loop and outside, drafted or not."""
    model = served(halting=halting, prelude_layers=2, coda_layers=2, core_layers=2)
    fast, token = stream_of(model, (2, 3))
    rounds = []
    while fast.held < 12:
        new = fast.round(token, 99)
        rounds.append(len(new))
        token = new[-1]
    slow, token = stream_of(model, (4, 0))
    while slow.held < fast.held:
        (token,) = slow.round(token, 99)
    assert max(rounds) > 1 and min(rounds) < 4  # drafts were accepted and rejected
    n = fast.held
    one, two = fast.sequences, slow.sequences
    assert torch.equal(one.looped.last[0, :n], two.looped.last[0, :n])
    for t in range(4):
        for layer in one.looped.pools:
            for name in ("latent", "k_rope"):
                held = [s.looped.pools[layer][name][s.looped.row(t)[0, :n]] for s in (one, two)]
                assert torch.equal(*held)
    for layer in one.outer.pools:
        for name in ("latent", "k_rope"):
            assert torch.equal(*(s.outer.pools[layer][name][s.outer.row(0)[0, :n]] for s in (one, two)))


def test_a_prompt_of_several_chunks(served, monkeypatch):
    monkeypatch.setattr("openmythos_kernels.serve.speculation.CHUNK", 3)
    model = served(halting="freeze")
    expected = Engine(model).submit(tokens(8), 9, temperature=0).result().tolist()
    assert list(speculative_stream(model, tokens(8), 9, speculate=(2, 3), temperature=0)) == expected


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Pearson's statistic, divided by its bound at a probability of 1e-6 (Wilson and Hilferty)."""
    assert not counts[p == 0].any()
    expected, order = (p.double() * counts.sum()).sort()
    counts = counts.double()[order]
    rare = max(int((expected < 5).sum()), int((expected.cumsum(0) < 5).sum()) + 1)  # rare cells count as one
    expected = torch.cat((expected[:rare].sum(0, keepdim=True), expected[rare:]))
    counts = torch.cat((counts[:rare].sum(0, keepdim=True), counts[rare:]))
    n = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return statistic / (n * (1 - 2 / (9 * n) + 4.75 * (2 / (9 * n)) ** 0.5) ** 3)


@pytest.mark.parametrize("options", [{}, dict(top_k=3), dict(top_p=0.7, temperature=0.8)], ids=str)
def test_an_accepted_or_replaced_draft_has_the_right_distribution(options, served):
    options = dict(temperature=1.0, top_k=0, top_p=1.0) | options
    stream, _ = stream_of(served(), (1, 1), **options)
    draw = torch.Generator().manual_seed(1)
    guess, right = torch.randn(2, 6, generator=draw)
    counts, kept = torch.zeros(6), 0
    for _ in range(8_000):
        draft = stream.request.sample(guess)
        token = stream._judge(draft, guess, right)
        kept += token is None
        counts[draft if token is None else token] += 1
    q, p = (distribution(x[None], **options)[0] for x in (guess, right))
    assert chi_square(counts, p) < 1
    assert abs(kept / 8_000 - float(torch.minimum(p, q).sum())) < 0.03  # the most that a lossless judge can accept


def test_a_draft_equal_to_the_model_is_always_accepted(served):
    stream, _ = stream_of(served(), (1, 1), temperature=1.0)
    logits = torch.randn(37)
    for draft in range(37):
        assert stream._judge(draft, logits, logits) is None


@pytest.mark.parametrize("halting", ["freeze", "off"])
def test_sampled_sequences_have_the_distribution_of_plain_decoding(halting, served):
    """Pairs of tokens of a vocabulary of 3, against their exact probabilities."""
    model = served(halting=halting, vocab_size=3)
    prompt, options = [0, 2], dict(temperature=1.5, top_k=0)
    p = torch.ones(3, 3, 3)
    with torch.no_grad():
        for a in range(3):
            for b in range(3):
                ids = torch.tensor([[*prompt, a, b]])
                rows = distribution(model(ids)[0, 1:], 1.5, 0, 1.0)
                p[a, b] = rows[0, a] * rows[1, b] * rows[2]
    counts = torch.zeros(3, 3, 3)
    for seed in range(400):
        a, b, c = speculative_stream(model, prompt, 3, speculate=(1, 2), seed=seed, **options)
        counts[a, b, c] += 1
    assert chi_square(counts.flatten(), p.flatten()) < 1


def test_the_same_seed_gives_the_same_tokens(served):
    model = served(halting="freeze")
    one, two, three = (list(speculative_stream(model, [1, 2], 12, speculate=(2, 3), seed=s)) for s in (1, 1, 2))
    assert one == two != three
