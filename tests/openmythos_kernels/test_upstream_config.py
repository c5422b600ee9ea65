"""Models whose `cfg` is open-mythos' config, which lacks our fields."""

from dataclasses import asdict, fields

import pytest
import torch

import openmythos
from openmythos.config import as_config, setting
from openmythos.training import load_checkpoint, load_model, save_checkpoint
from openmythos_kernels import accelerate
from openmythos_kernels.depth import depth_stats
from tests.kit.tiny import SMALL, enliven, relative, tiny_config, tiny_model, tokens
from tests.kit.upstream import load_upstream


@pytest.fixture(scope="module")
def upstream_cfg():
    return load_upstream().MythosConfig(**SMALL)


def with_their_config(model, cfg):
    for module in model.modules():
        if hasattr(module, "cfg"):
            module.cfg = cfg
    return model


def test_missing_fields_have_our_defaults(upstream_cfg):
    theirs = {f.name for f in fields(upstream_cfg)}
    ours = [f for f in fields(openmythos.MythosConfig) if f.name not in theirs]
    assert len(ours) >= 7 and all(setting(upstream_cfg, f.name) == f.default for f in ours)
    assert setting(tiny_config(halting="freeze"), "halting") == "freeze"
    assert asdict(as_config(upstream_cfg)) == asdict(tiny_config())


@pytest.mark.parametrize("fast", [False, True])
def test_forward_training_generation_and_statistics(upstream_cfg, fast):
    want, model = tiny_model(), with_their_config(tiny_model(), upstream_cfg)
    if fast:
        model = with_their_config(accelerate(model), upstream_cfg)
    ids = tokens(2, 9)
    assert relative(model(ids), want(ids)) < 1e-5
    assert relative(model(ids, n_loops=[2, 4])[0], want(ids, n_loops=[2, 4])[0]) < 1e-5
    assert torch.equal(model.generate(ids, 4, temperature=0), want.generate(ids, 4, temperature=0))
    for m in (model, want):
        m(ids, return_ponder=True, grad_loops=2, checkpoint_loops=True)[1].sum().backward()
    assert relative(model.embed.weight.grad, want.embed.weight.grad) < 1e-5
    with depth_stats(model) as stats:
        model(ids)
    assert sum(stats.histogram) == ids.numel()


def test_checkpoints_contain_our_config(upstream_cfg, tmp_path):
    model = with_their_config(tiny_model(), upstream_cfg)
    for name in ("a.pt", "a.safetensors"):
        save_checkpoint(tmp_path / name, model, step=3)
        again = load_model(tmp_path / name)
        assert type(again.cfg) is openmythos.MythosConfig and torch.equal(again(tokens(1, 5)), model(tokens(1, 5)))
        assert load_checkpoint(tmp_path / name, model) == 3


def test_our_model_accepts_their_config(upstream_cfg):
    torch.manual_seed(0)
    model = enliven(openmythos.OpenMythos(upstream_cfg)).eval()
    assert torch.equal(model(tokens(1, 5)), tiny_model()(tokens(1, 5)))
