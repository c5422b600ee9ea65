"""Classes that count as open_mythos' own, by their source and by the code that runs."""

import importlib.util
import inspect
import types

import pytest
import torch.nn as nn

import openmythos
from openmythos_kernels.upstream import ACCEPTED, judge, patched
from openmythos_kernels.upstream.digest import class_digests
from tools.digests import CLASSES, table

SOURCE = '''
import torch.nn.functional as F

SCALE = 2.0

def helper(x, *, by=SCALE):
    """Words."""
    return x * by

class Layer:
    """Words."""

    def forward(self, x: int, words: list[str] = None) -> int:
        """Words."""
        return F.silu(helper(x)[..., 1:]) if x is not None else f"{x!r:>{3}}"
'''
# From Python 3.11; every version must give the same.
DIGEST = "707cc5ef76d0d9c96b9dec55b04f1e4f0a1bf0066eec34b4f3884b13a43a83e3"


def test_the_digest_is_the_same_on_every_version_of_python():
    assert class_digests(SOURCE)["Layer"] == DIGEST


@pytest.mark.parametrize(
    "old, new",
    [
        ('"""Words."""', '"""Other words."""'),
        ('    """Words."""\n\n', "\n"),
        ("return x * by", "return (x  *  by)  # doubled"),
        ("x: int, words: list[str]", "x, words"),
        ("import torch", "import os\n\nimport torch"),
    ],
)
def test_what_computes_nothing_does_not_count(old, new):
    assert old in SOURCE and class_digests(SOURCE.replace(old, new))["Layer"] == DIGEST


@pytest.mark.parametrize(
    "old, new",
    [
        ("F.silu", "F.gelu"),
        ("= 2.0", "= 2.5"),
        ("x * by", "x + by"),
        ("as F", "as G"),
        ("1:", "1::1"),
        ("= None)", "= 1)"),
    ],
)
def test_what_computes_counts(old, new):
    assert old in SOURCE and class_digests(SOURCE.replace(old, new))["Layer"] != DIGEST


def test_the_installed_release_and_the_head_are_known(upstream):
    for name in CLASSES:
        assert judge(getattr(upstream, name)).known, name
    release = table({"0.5.0": inspect.getsource(upstream)})
    assert all(release[name].keys() <= ACCEPTED[name].keys() for name in CLASSES)
    assert "head-8c68c1f" in ACCEPTED["OpenMythos"].values()


def loaded(upstream, path, old="", new=""):
    """The installed main.py with one change, as a module of its own."""
    text = inspect.getsource(upstream)
    assert old in text
    path.write_text(text.replace(old, new) if old else text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_may_lie_anywhere(upstream, tmp_path):
    copy = loaded(upstream, tmp_path / "mymodel.py")
    assert all(judge(getattr(copy, name)).known for name in CLASSES)


def test_a_changed_function_is_every_users_change(upstream, tmp_path):
    fork = loaded(
        upstream,
        tmp_path / "fork.py",
        "return torch.polar(torch.ones_like(freqs), freqs)",
        "return torch.polar(freqs, freqs)",
    )
    assert "known version" in judge(fork.OpenMythos).reason and judge(fork.MLAttention).known
    fork = loaded(upstream, tmp_path / "other.py", ".flatten(-2)", ".flatten(-2) * 1")
    assert judge(fork.MLAttention).reason and judge(fork.GQAttention).reason and judge(fork.MoEFFN).known


PATCHES = {
    "a method": lambda m: setattr(m.MLAttention, "forward", lambda self, x, *rest: x),
    "a method more": lambda m: setattr(m.MLAttention, "__call__", lambda self, x, *rest: x),
    "a callable": lambda m: setattr(m.MLAttention, "forward", nn.Identity()),
    "a function": lambda m: setattr(m, "apply_rope", lambda x, freqs: x),
    "a module": lambda m: setattr(m, "F", types.SimpleNamespace(**vars(m.F))),
    "flash attention": lambda m: setattr(m, "_HAS_FLASH_ATTN", True),
}


@pytest.mark.parametrize("patch", PATCHES)
def test_what_runs_is_compared_with_the_source(upstream, tmp_path, patch):
    copy = loaded(upstream, tmp_path / "mymodel.py")
    PATCHES[patch](copy)
    judgement = judge(copy.GQAttention if patch == "flash attention" else copy.MLAttention)
    assert judgement.name and judgement.reason
    assert judge(copy.LTIInjection).known


def test_other_packages_may_use_the_names():
    class RMSNorm(nn.Module):
        def forward(self, x):
            return x

    assert not judge(RMSNorm).name and not judge(nn.RMSNorm).name and not judge(nn.Linear).name


def test_our_own_classes_can_be_patched_too(monkeypatch):
    assert not patched(openmythos.MLAttention)
    monkeypatch.setattr("openmythos.attention.apply_rope", lambda x, freqs: x)
    assert "apply_rope" in patched(openmythos.MLAttention) and not patched(openmythos.MoEFFN)
    monkeypatch.setattr(openmythos.MoEFFN, "route", lambda self, flat: None)
    assert "route" in patched(openmythos.MoEFFN)
