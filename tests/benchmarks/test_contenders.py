"""All contenders compute the same, and rewinding restores their caches."""

import pytest
import torch

from benchmarks.contenders import LABELS, build, check_agreement, run_to_full_depth
from openmythos.training import Batches
from tests.kit.threads import threads
from tests.kit.tiny import SMALL

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """With models this small, threads would mostly wait for each other."""
    with threads(1):
        yield


@pytest.fixture
def contenders():
    # Without "compiled", since compiling takes too long; its arithmetic is tested in eager mode below.
    made, missing = build(SMALL, [name for name in LABELS if name != "compiled"], CPU)
    assert set(missing) <= {"upstream"}
    return made


def test_all_agree_in_prefill_decode_and_training(contenders):
    ids = torch.randint(0, 32, (1, 9))
    logits, decoded, losses = {}, {}, {}
    for name, contender in contenders.items():
        run_to_full_depth(contender, 3)
        logits[name] = contender.prefill(ids, 3)
        decoded[name] = contender.decode(ids[:, :1], contender.cached(ids, 3), 3)
        steps = contender.training(Batches(ids.flatten().repeat(4), 2, 8), 3, 3)
        losses[name] = torch.tensor([step.loss for step in steps])
    for results in (logits, decoded, losses):
        assert max(check_agreement(results).values()) < 1e-5


def test_decode_can_be_repeated_after_rewind(contenders):
    ids = torch.randint(0, 32, (1, 9))
    for contender in contenders.values():
        cache = contender.cached(ids, 2)
        first = contender.decode(ids[:, :1], cache, 2)
        cache.rewind()
        assert torch.equal(contender.decode(ids[:, :1], cache, 2), first)


def test_no_position_halts_at_full_depth_and_the_state_keeps_its_scale(contenders):
    model = contenders["reference"].model
    run_to_full_depth(contenders["reference"], 3)
    state = torch.randn(1, 2, SMALL["dim"])
    _, ponder = model.recurrent(state, state, model.freqs_cis_mla[:2], None, 3, return_ponder=True)
    cumulative_p = 3 + 1 - ponder  # ponder = N + R, with N = 3 loops and the remainder R = 1 - cumulative_p
    assert torch.allclose(cumulative_p, torch.full_like(cumulative_p, 0.6))


def test_a_contender_with_different_results_is_an_error():
    right = torch.ones(3)
    with pytest.raises(ArithmeticError, match=r"ours .* off the reference"):
        check_agreement({"reference": right, "ours": right * 1.1})
    with pytest.raises(ArithmeticError):
        check_agreement({"reference": right, "ours": right * float("nan")})


@torch.compiler.set_stance("force_eager")
def test_compiled_parts_compute_what_the_reference_computes():
    pair = build(SMALL, ["reference", "compiled"], CPU)[0]
    ids = torch.randint(0, 32, (1, 9))
    prefilled = {name: c.prefill(ids, 3) for name, c in pair.items()}
    decoded = {name: c.decode(ids[:, :1], c.cached(ids, 3), 3) for name, c in pair.items()}
    for results in (prefilled, decoded):
        assert check_agreement(results)["compiled"] < 1e-6


def test_missing_upstream_is_reported(monkeypatch):
    def absent():
        raise ImportError("open-mythos is not installed")

    monkeypatch.setattr("benchmarks.contenders.load_upstream", absent)
    made, missing = build(SMALL, ["upstream", "reference"], CPU)
    assert list(made) == ["reference"] and missing == {"upstream": "open-mythos is not installed"}
