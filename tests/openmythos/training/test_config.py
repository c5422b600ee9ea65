from dataclasses import asdict, fields

import pytest

from openmythos import DenseConfig, MythosConfig
from openmythos.training.config import MemoryConfig, ModelConfig, TrainConfig, differences, model_config
from openmythos.training.depth import DepthConfig
from openmythos.training.losses import LossConfig
from openmythos.variants import VARIANTS


def test_every_field_of_a_model_is_a_key_with_a_meaning():
    keys = {f.name for f in fields(ModelConfig)}
    assert keys == {"kind", "size"} | {f.name for f in fields(DenseConfig)}
    for key in keys:
        assert f"\n        {key}: " in ModelConfig.__doc__, key


@pytest.mark.parametrize("name", VARIANTS)
def test_a_named_size_is_what_it_is_elsewhere(name):
    assert model_config(ModelConfig(size=name)) == VARIANTS[name]()


def test_keys_change_a_named_size():
    cfg = model_config(ModelConfig(size="mythos_1b", n_experts=8, halting="off"))
    assert (cfg.dim, cfg.n_experts, cfg.halting) == (2048, 8, "off")


def test_a_dense_model_of_no_named_size():
    cfg = model_config(ModelConfig(kind="dense", n_layers=3, dim=64))
    assert isinstance(cfg, DenseConfig) and (cfg.n_layers, cfg.dim) == (3, 64)


def small(**changes):
    model = ModelConfig(vocab_size=64, dim=32, n_heads=2, n_kv_heads=1, max_seq_len=32, n_experts=4)
    return TrainConfig(**{"model": model, "tokens": 16, **changes})


def test_what_fits_gives_the_model():
    assert isinstance(small().check(), MythosConfig)


@pytest.mark.parametrize(
    "changes, ranks, message",
    [
        ({"tokens": 33}, 1, "tokens = 33: must be <= model.max_seq_len = 32"),
        ({"batch": 6}, 4, "batch = 6: must be a multiple of 4 ranks"),
        ({"batch": 6, "accumulate": 4}, 1, "batch = 6: must be a multiple of 1 ranks [*] accumulate = 4"),
        (
            {"model": ModelConfig(kind="dense"), "tokens": 16, "memory": MemoryConfig(checkpoint_loops=True)},
            1,
            "memory.checkpoint_loops = True: must be False for a dense model",
        ),
        ({"model": ModelConfig(size="mythos_2b")}, 1, "model.size = 'mythos_2b': must be"),
        ({"model": ModelConfig(n_layers=3)}, 1, "model.n_layers = 3: must be unset"),
        ({"model": ModelConfig(dim=31, injection="nothing")}, 1, "MythosConfig.injection = 'nothing'"),
        ({"model": ModelConfig(halting="off"), "loss": LossConfig(ponder_weight=1)}, 1, "loss.ponder_weight = 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(changes, ranks, message):
    with pytest.raises(ValueError, match=message):
        small(**changes).check(ranks)


@pytest.mark.parametrize("key", ["steps", "batch", "tokens", "accumulate", "patience"])
def test_numbers_below_one_are_refused(key):
    with pytest.raises(ValueError, match=f"{key} = 0: must be an integer >= 1"):
        TrainConfig(**{key: 0})


def test_differences_name_what_a_resumed_run_must_not_change():
    before, now = asdict(small()), asdict(small(depth=DepthConfig(mean=5), fast=False, out="elsewhere"))
    assert differences(before, now) == ["depth.mean was 4.0, is 5"]
