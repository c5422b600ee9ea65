"""A missing, broken or foreign extension is a reason, never a crash."""

import importlib
import types

import pytest
import torch

from openmythos_kernels.runtime import build, extension


def test_this_machine_has_the_extension():
    """CI builds the extension; without it only fallbacks would be tested."""
    assert extension.module is not None, extension.reason


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch, tmp_path):
    """Without this checkout's record of a build and without a cache."""
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    monkeypatch.setenv("OPENMYTHOS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENMYTHOS_BUILD", raising=False)


_FOUND = object()


def loads(monkeypatch, module=None, spec=_FOUND, error=None):
    def fake_import(name):
        if error:
            raise error
        return module

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(importlib, "import_module", fake_import)
    return extension._load()


def built(version=torch.__version__, capability="DEFAULT"):
    return types.SimpleNamespace(torch_version=version, cpu_capability=capability)


def test_missing(monkeypatch):
    module, reason = loads(monkeypatch, spec=None)
    assert module is None and "not built" in reason


def test_missing_for_a_reason(monkeypatch, tmp_path):
    (tmp_path / build.RECORD).write_text('{"reason": "there is no compiler"}')
    assert "not built when this was installed: there is no compiler; " in loads(monkeypatch, spec=None)[1]


@pytest.mark.parametrize("text", ["", "[]", '{"reason": ""}', "\xff{"])
def test_missing_without_a_reason(monkeypatch, tmp_path, text):
    (tmp_path / build.RECORD).write_text(text)
    assert "the C++ extension was not built; " in loads(monkeypatch, spec=None)[1]


@pytest.mark.parametrize(
    "record, said", [('{"torch": "1.13.0"}', "for torch 1.13.0"), ('{"capability": "AVX512"}', "for AVX512 but")]
)
def test_what_was_built_for_another_is_not_even_loaded(monkeypatch, tmp_path, record, said):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    (tmp_path / build.RECORD).write_text(record)
    module, reason = loads(monkeypatch, error=AssertionError("it was loaded"))
    assert module is None and said in reason


@pytest.mark.parametrize("error", [ImportError("undefined symbol: _ZN2at4"), OSError("file too short")])
def test_broken(monkeypatch, error):
    module, reason = loads(monkeypatch, error=error)
    assert module is None and str(error) in reason and "rebuild" in reason


def test_built_for_another_torch(monkeypatch):
    module, reason = loads(monkeypatch, built("1.13.0"))
    assert module is None and "torch 1.13.0" in reason and torch.__version__ in reason


def test_built_for_a_wider_processor(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    module, reason = loads(monkeypatch, built(capability="AVX512"))
    assert module is None and "AVX512" in reason and "AVX2" in reason


def test_whole(monkeypatch):
    module, reason = loads(monkeypatch, built())
    assert module is not None and reason is None


@pytest.mark.parametrize(
    "architectures, capability, reason",
    [
        ("", (9, 0), "without CUDA kernels (nvcc was not found)"),
        ("8.0;9.0", None, "no usable GPU and driver"),
        ("8.0;9.0;10.0+PTX", (9, 0), ""),
        ("8.0", (8, 6), ""),
        ("8.6", (8, 0), "built for 8.6, this GPU is 8.0"),
        ("8.0 9.0+PTX", (12, 0), ""),
        ("9.0a", (10, 0), "this GPU is 10.0"),
    ],
)
def test_whether_the_cuda_kernels_can_run(tmp_path, monkeypatch, architectures, capability, reason):
    (tmp_path / "_build.json").write_text('{"without_cuda": "nvcc was not found"}')
    module = types.SimpleNamespace(cuda_architectures=architectures, __file__=str(tmp_path / "_C.so"))
    monkeypatch.setattr(extension, "module", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert reason in extension.cuda_reason() if reason else extension.cuda_reason() == ""
