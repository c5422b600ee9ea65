"""What an engine refuses: bad arguments by name, and models whose parts its ops cannot stand in for."""

import pytest
import torch

from openmythos_kernels import accelerate
from openmythos_kernels.serve import Engine, speculative_stream
from tests.kit.tiny import tiny_model, tokens

BAD = {
    "prompt of floats": (dict(prompt=[0.5]), "^prompt: "),
    "no prompt": (dict(prompt=[]), "^prompt: "),
    "two dimensions": (dict(prompt=torch.zeros(1, 2, dtype=torch.int64)), "^prompt: "),
    "tokens outside": (dict(prompt=[3, 37]), r"prompt: found tokens 3 .. 37: must be in 0 .. 36"),
    "negative": (dict(prompt=[-1]), "prompt: found tokens -1"),
    "too long": (dict(max_new_tokens=22), "max_new_tokens = 22: must be <= 21"),
    "tokens": (dict(max_new_tokens=1.5), "max_new_tokens = 1.5"),
    "temperature": (dict(temperature=-1), "temperature = -1"),
    "top_k": (dict(top_k=0.5), "top_k = 0.5"),
    "top_p": (dict(top_p=0), "top_p = 0"),
    "eos": (dict(eos=37), "eos = 37"),
    "seed": (dict(seed="a"), "seed = 'a'"),
    "loops": (dict(n_loops=0), "n_loops = 0"),
    "loops for each": (dict(n_loops=[2]), r"n_loops = \[2\]: a request has one"),
    "too many loops": (dict(n_loops=129), "n_loops = 129: a token keeps at most 128 loops"),
    "exit": (dict(exit="soon"), "exit = 'soon'"),
}


@pytest.fixture
def engine(needs_extension):
    return Engine(accelerate(tiny_model()))


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_bad_arguments_are_named(options, message, engine):
    with pytest.raises(ValueError, match=message):
        engine.submit(**{"prompt": [1, 2, 3], "max_new_tokens": 2, **options})
    assert not engine.step()


@pytest.mark.parametrize(
    "options", [dict(slots=0), dict(slots=1.5), dict(chunk=0), dict(budget=0), dict(keep=0)], ids=str
)
def test_an_engines_own_arguments_are_named(options, engine):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} = "):
        Engine(engine.model, **options)


@pytest.mark.parametrize("pair", [3, (2,), (0, 2), (5, 2), (2, -1), (1.5, 2), "ab"], ids=str)
def test_a_bad_speculation_is_named(pair, engine):
    with pytest.raises(ValueError, match="speculate = "):
        speculative_stream(engine.model, [1], 2, speculate=pair)
    with pytest.raises(ValueError, match="temperature"):
        speculative_stream(engine.model, [1], 2, speculate=(2, 2), temperature=-1)


REFUSED = {
    "grouped queries": (dict(attn_type="gqa"), "prelude_0: attn is not a plain MLAttention"),
    "another injection": (dict(injection="parcae"), 'injection="parcae"'),
    "noise": (dict(h0="noise"), 'h0="noise"'),
}


@pytest.mark.parametrize("fields, reason", REFUSED.values(), ids=REFUSED)
def test_models_that_the_ops_cannot_take_are_refused(fields, reason, needs_extension):
    with pytest.raises(ValueError, match=f"model: cannot be served: {reason}"):
        Engine(accelerate(tiny_model(**fields)))


def in_training(model):
    model.train()


def hooked(name):
    def change(model):
        model.get_submodule(name).register_forward_hook(lambda *_: None)

    return change


def with_own_forward(model):
    model.recurrent.step = lambda *args: None


def in_two_dtypes(model):
    model.coda.double()


def in_complex128(model):
    model.freqs_cis_mla = model.freqs_cis_mla.to(torch.complex128)


CHANGED = {
    "dropout": (in_training, "dropout"),
    "a hook on the model": (hooked(""), "model has hooks"),
    "a hook on the embedding": (hooked("embed"), "embed has hooks"),
    "a hook on the head": (hooked("head"), "head has hooks"),
    "a hook on the final norm": (hooked("norm"), "norm has hooks"),
    "a hook in the prelude": (hooked("prelude.0.ffn.up"), "prelude_0: "),
    "a hook on the looped block": (hooked("recurrent.block"), "block has hooks"),
    "a hook on the halting": (hooked("recurrent.act"), "act has hooks"),
    "a hook on the LoRA": (hooked("recurrent.lora.down"), "down has hooks"),
    "a step of its own": (with_own_forward, "recurrent has a step of its own"),
    "two dtypes": (in_two_dtypes, "coda_0: "),
    "wide angles": (in_complex128, "rotary angles"),
}


@pytest.mark.parametrize("change, reason", CHANGED.values(), ids=CHANGED)
def test_changed_models_are_refused_at_the_next_request(change, reason, needs_extension):
    model = accelerate(tiny_model(dropout=0.1))
    engine = Engine(model)
    change(model)
    with pytest.raises(ValueError, match=f"model: cannot be served: .*{reason}"):
        engine.submit(tokens(3))


def test_a_model_must_be_accelerated(needs_extension):
    with pytest.raises(ValueError, match="no OpenMythos that openmythos_kernels"):
        Engine(tiny_model())
