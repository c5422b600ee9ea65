import inspect

import numpy as np
import pytest
import torch

from openmythos import DenseConfig, DenseTransformer, generate, stream
from openmythos.generate import sample
from tests.kit.tiny import SMALL, enliven, tiny_model, tokens
from tests.kit.upstream import load_upstream


@pytest.mark.parametrize("kind", ["mla", "gqa"])
@pytest.mark.parametrize("halting", ["evolve", "freeze"])
def test_greedy_is_the_argmax_without_a_cache(kind, halting):
    model = tiny_model(attn_type=kind, halting=halting)
    ids = prompt = tokens(2, 4)
    for _ in range(6):
        ids = torch.cat((ids, model(ids, n_loops=3)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generate(model, prompt, 6, n_loops=3, temperature=0), ids)
    assert torch.equal(model.generate(prompt, 6, n_loops=3, top_k=1, seed=1), ids)


def test_prompts_of_different_length_equal_one_by_one():
    model = tiny_model()
    prompts = [tokens(n, seed=n) for n in (5, 2, 9)]
    together = generate(model, prompts, 6, temperature=0)
    for prompt, row in zip(prompts, together):
        assert torch.equal(row, generate(model, [prompt.tolist()], 6, temperature=0)[0])


def test_seeds_repeat_and_leave_the_global_generator_alone():
    model = tiny_model()
    state = torch.get_rng_state()
    first = model.generate(tokens(2, 4), 8, seed=3)
    assert torch.equal(first, model.generate(tokens(2, 4), 8, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, model.generate(tokens(2, 4), 8, seed=4))
    torch.manual_seed(5)
    free = model.generate(tokens(2, 4), 8)
    torch.manual_seed(5)
    assert torch.equal(free, model.generate(tokens(2, 4), 8))


def drawn(logits, **options) -> torch.Tensor:
    """Frequencies of the sampled tokens, 4000 draws."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    token = sample(logits.expand(4000, -1), generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(token, minlength=logits.shape[-1]) / 4000


PROB = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05])


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, PROB),
        (dict(temperature=0.5), PROB**2 / (PROB**2).sum()),
        (dict(temperature=1e-40), [0, 1, 0, 0, 0]),
        (dict(temperature=0), [0, 1, 0, 0, 0]),
        (dict(top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (dict(top_k=1), [0, 1, 0, 0, 0]),
        (dict(top_k=99), PROB),
        (dict(top_p=0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (dict(top_p=0.66), [0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0]),
        (dict(top_p=1e-6), [0, 1, 0, 0, 0]),
        (dict(top_p=1e-46), [0, 1, 0, 0, 0]),  # both round to 0 in float32
        (dict(temperature=1e-46), [0, 1, 0, 0, 0]),
        (dict(top_k=-1), PROB),
        (dict(top_k=2, top_p=0.6), [0, 1, 0, 0, 0]),  # 0.4 / 0.65 is enough
        (dict(top_k=3, top_p=0.9), [0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0]),
    ],
)
def test_sampling_laws(options, expected):
    torch.testing.assert_close(drawn(PROB.log() + 7, **options), torch.as_tensor(expected).float(), atol=0.04, rtol=0)
    assert set(drawn(PROB.log(), **options).nonzero()[:, 0].tolist()) == {i for i, p in enumerate(expected) if p}


def test_eos_ends_rows_and_the_stream():
    model = tiny_model()
    prompts = [tokens(4, seed=s) for s in range(3)]
    free = generate(model, prompts, 12, temperature=0)
    eos = int(free[0][4 + 2])  # the third token of the first row
    rows = generate(model, prompts, 12, temperature=0, eos=eos)
    for row, whole in zip(rows, free):
        added = whole[4:].tolist()
        end = added.index(eos) + 1 if eos in added else 12
        assert row[4:].tolist() == added[:end]
    alone = list(stream(model, prompts[:1], 12, temperature=0, eos=eos))
    assert len(alone) == len(rows[0]) - 4 <= 3
    padded = generate(model, torch.stack(prompts), 12, temperature=0, eos=eos)
    for row, whole in zip(rows, padded):
        assert torch.equal(whole[: len(row)], row) and (whole[len(row) :] == eos).all()


def test_several_tokens_may_end_a_row():
    model = tiny_model()
    prompts = [tokens(4, seed=s) for s in range(3)]
    free = generate(model, prompts, 12, temperature=0)
    one, two = int(free[0][4 + 2]), int(free[1][4 + 4])
    for eos in ([two, one], (two, one), torch.tensor([two, one]), np.array([two, one])):
        rows = generate(model, prompts, 12, temperature=0, eos=eos)
        for row, whole in zip(rows, free):
            added = whole[4:].tolist()
            ends = [added.index(e) + 1 for e in (one, two) if e in added]
            assert row[4:].tolist() == added[: min(ends, default=12)]
        padded = generate(model, torch.stack(prompts), 12, temperature=0, eos=eos)
        assert all((whole[len(row) :] == two).all() for row, whole in zip(rows, padded))
    assert torch.equal(
        generate(model, prompts, 12, temperature=0, eos=[one])[0],
        generate(model, prompts, 12, temperature=0, eos=one)[0],
    )


def test_open_mythos_calling_form():
    """The order of its arguments, its use of the global generator, and its default number of loops."""
    theirs = load_upstream()
    upstream = enliven(theirs.OpenMythos(theirs.MythosConfig(**SMALL, act_threshold=9.0))).eval()
    model = tiny_model(act_threshold=9.0)  # every loop matters
    names = list(inspect.signature(upstream.generate).parameters)
    assert list(inspect.signature(model.generate).parameters)[: len(names)] == names

    def drawn(generator, *arguments, **options):
        torch.manual_seed(0)
        return generator(tokens(2, 4), *arguments, **options)

    for arguments in ((6, 2, 0.7, 20), (6, 3, 1.3, 0), (6, None, 1.0, -1)):
        assert torch.equal(drawn(model.generate, *arguments), drawn(upstream.generate, *arguments))
    assert torch.equal(drawn(model.generate, 6, top_k=9), drawn(upstream.generate, 6, n_loops=4, top_k=9))
    assert not torch.equal(drawn(model.generate, 6, top_k=9), drawn(upstream.generate, 6, top_k=9))  # 4 and 8 loops
    model.default_generate_loops = 8
    assert torch.equal(drawn(model.generate, 6, top_k=9), drawn(upstream.generate, 6, top_k=9))
    assert torch.equal(drawn(model.generate, 6, None, top_k=9), drawn(upstream.generate, 6, None, top_k=9))
    for integer in (np.int64, torch.tensor):
        assert torch.equal(
            drawn(model.generate, integer(6), integer(2), 1.0, integer(5)), drawn(upstream.generate, 6, 2, 1.0, 5)
        )


def test_training_flags_stay():
    model = tiny_model(dropout=0.5).train()
    model.coda.eval()
    flags = [module.training for module in model.modules()]
    steps = stream(model, tokens(1, 4), 8)
    assert flags == [module.training for module in model.modules()]  # nothing runs before the first token
    next(steps)
    assert flags == [module.training for module in model.modules()]
    steps.close()
    model.generate(tokens(1, 4), 2)
    assert flags == [module.training for module in model.modules()]
    with pytest.raises(ValueError):
        model.generate(torch.full((1, 4), 99), 2)
    assert flags == [module.training for module in model.modules()]
    assert torch.is_grad_enabled()


def test_no_graph_is_kept():
    steps = stream(tiny_model(), tokens(1, 4), 2)
    assert not next(steps).requires_grad and torch.is_grad_enabled()


def test_up_to_the_last_position():
    model = tiny_model()
    assert model.generate(tokens(1, 20), 4).shape == (1, 24)
    assert torch.equal(model.generate(tokens(1, 20), 0), tokens(1, 20))
    assert model.generate(tokens(1, 24), 0).shape == (1, 24)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        (tokens(1, 20), dict(max_new_tokens=5), "max_new_tokens = 5: must be <= 4: the longest prompt has 20"),
        (tokens(1, 4), dict(max_new_tokens=-1), "max_new_tokens = -1: must be an integer >= 0"),
        (tokens(1, 4), dict(temperature=-1.0), "temperature = -1.0: must be >= 0"),
        (tokens(1, 4), dict(top_k=2.5), "top_k = 2.5"),
        (tokens(1, 4), dict(top_p=0.0), "top_p = 0.0"),
        (tokens(1, 4), dict(top_p=1.5), "top_p = 1.5"),
        (tokens(1, 4), dict(eos=37), "eos = 37: must be None or in 0 .. 36"),
        (tokens(1, 4), dict(eos=[3, 37]), r"eos = \[3, 37\]: must be None or in 0 .. 36"),
        (tokens(1, 4), dict(eos=[]), r"eos = \[\]: must be"),
        (tokens(1, 4), dict(eos=3.0), "eos = 3.0: must be"),
        (tokens(1, 4), dict(top_k=None), "top_k = None: must be an integer"),
        (tokens(1, 4), dict(n_loops=0), "n_loops = 0"),
        (tokens(1, 4).float(), {}, r"prompts\[0\]: torch.float32"),
        (tokens(4), {}, r"prompts\[0\]"),
        ([[1, 2], []], {}, r"prompts\[1\]"),
        ([], {}, "prompts: got none"),
        ([[1, 40]], {}, r"input_ids: found 0 .. 40|input_ids: found 1 .. 40"),
    ],
)
def test_errors(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(prompts, **{"max_new_tokens": 2, **options})


def test_a_dense_model_generates():
    cfg = DenseConfig(vocab_size=37, dim=24, n_heads=2, max_seq_len=16, attn_type="gqa", n_kv_heads=1, n_layers=2)
    model = enliven(DenseTransformer(cfg))
    ids = prompt = tokens(2, 4)
    for _ in range(5):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(prompt, 5, temperature=0), ids)
