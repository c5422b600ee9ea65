"""A swapped module keeps its class: for isinstance, for pickle, and for a process without this package."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import openmythos
from openmythos_kernels import accelerate, restore
from tests.kit.tiny import tiny_config
from tests.outside.works import IDS, PACKAGES, assert_same, make, results


def classes_of(model) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_swapped_module_is_an_instance_of_its_class(package):
    model = make(package)
    before = classes_of(model)
    accelerate(model)
    after = classes_of(model)
    assert any(after[name] is not cls for name, cls in before.items())
    for name, cls in before.items():
        module = model.get_submodule(name)
        assert isinstance(module, cls), (name, cls)
        assert type(module).__name__ == cls.__name__, name
    restore(model)
    assert classes_of(model) == before


@pytest.mark.parametrize("package", PACKAGES)
def test_the_class_of_a_fast_and_an_upstream_class_is_made_once(package):
    one, other = accelerate(make(package)), accelerate(make(package))
    assert classes_of(one) == classes_of(other)
    assert type(one.prelude[0].attn) is type(one.coda[0].attn)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("way", ["pickle", "torch.save", "copy.deepcopy", "copy.copy"])
def test_copies(package, way):
    model = accelerate(make(package))
    before = results(model)
    if way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = getattr(copy, way.split(".")[1])(model)
    assert classes_of(other) == classes_of(model)
    assert type(other.cfg) is type(model.cfg)
    assert_same(results(other), before)
    restore(other)


def test_the_model_keeps_its_config(upstream):
    model = make("open_mythos")
    cfg = model.cfg
    accelerate(model)
    assert type(model.cfg) is upstream.MythosConfig and model.cfg is cfg and model.recurrent.cfg is cfg


def test_upstreams_benchmark_passes_its_depths(upstream):
    """Its script passes n_loops only if isinstance(model, OpenMythos)."""

    @torch.no_grad()
    def sweep(model):
        out = []
        for depth in (1, 2, 4):
            named = {"n_loops": depth} if isinstance(model, upstream.OpenMythos) else {}
            out.append(model(IDS, **named))
        return out

    model = make("open_mythos", act_threshold=0.999999)
    expected = sweep(model)
    found = sweep(accelerate(model))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[0], found[1])


def test_a_checkpoint_loads_without_this_package(upstream, tmp_path):
    """A process that cannot import this package loads what upstream's script saves: state_dict and cfg."""
    model = accelerate(make("open_mythos"))
    torch.save({"model": model.state_dict(), "cfg": model.cfg}, tmp_path / "step.pt")
    expected = restore(model)(IDS).detach()
    torch.save((IDS, expected), tmp_path / "expected.pt")
    script = textwrap.dedent(
        """
        import importlib.util, sys, torch

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("openmythos", "openmythos_kernels"):
                    raise ImportError("the checkpoint asks for " + name)

        sys.meta_path.insert(0, Refuse())
        name, main, folder = sys.argv[1:]
        spec = importlib.util.spec_from_file_location(name, main)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        held = torch.load(folder + "/step.pt", weights_only=False)
        assert type(held["cfg"]) is module.MythosConfig
        model = module.OpenMythos(held["cfg"])
        model.load_state_dict(held["model"])
        ids, expected = torch.load(folder + "/expected.pt")
        torch.testing.assert_close(model.eval()(ids).detach(), expected)
        """
    )
    command = [sys.executable, "-c", script, upstream.__name__, str(Path(upstream.__file__)), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]


def test_a_swapped_reference_model_is_an_instance_of_the_reference():
    model = accelerate(openmythos.OpenMythos(tiny_config()))
    assert isinstance(model, openmythos.OpenMythos) and isinstance(model.recurrent, openmythos.RecurrentBlock)
