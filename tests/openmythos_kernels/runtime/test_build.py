"""The extension compiled after installation: once per PyTorch and sources, by one process, or with a reason."""

import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch

import openmythos_kernels
from openmythos_kernels.runtime import build, extension

ROOT = Path(__file__).parents[3]
# A module without kernels in the extension's place, which compiles in seconds.
SMALL = """#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of an installed package that has only sources."""
    folder = tmp_path / "openmythos_kernels"
    shutil.copytree(ROOT / "building", folder / "_source" / "building", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "_source" / "csrc").mkdir()
    (folder / "_source" / "csrc" / "bindings.cpp").write_text(SMALL)
    monkeypatch.setattr(build, "PACKAGE", folder)
    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("OPENMYTHOS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no toolkit"))  # with CUDA kernels it is loaded by the next process
    monkeypatch.delenv("OPENMYTHOS_BUILD", raising=False)
    monkeypatch.delitem(sys.modules, extension._NAME, raising=False)
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "reason", "it is not built")
    return folder


def test_the_sources_of_this_checkout_are_found():
    names = build.sources()
    assert {"csrc/bindings.cpp", "building/recipe.py"} <= set(names) and len(names) > 50


def test_compiles_once_and_loads(package, capsys):
    path = openmythos_kernels.build()
    said = capsys.readouterr().err
    assert "compiling the C++ extension for torch" in said and "bindings.cpp" in said and f"{path} is ready" in said
    assert extension.module is not None and extension.reason is None and Path(extension.module.__file__) == path
    assert build.record(path.parent)["torch"] == torch.__version__
    assert build.compiled() == path and capsys.readouterr().err == ""
    del sys.modules[extension._NAME]
    assert extension._load()[0].__file__ == str(path)  # as the next process does when it imports the package
    (package / "_source" / "csrc" / "bindings.cpp").write_text(SMALL + "// another\n")
    assert build.place() != path.parent


def test_is_kept_apart_by_what_it_is_made_for(package, monkeypatch):
    places = {build.place()}
    for owner, name, value in (
        (torch, "__version__", "2.99.0"),
        (torch.version, "git_version", "0"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "SVE"),
        (build.sysconfig, "get_config_var", lambda name: "cpython-399"),
    ):
        with monkeypatch.context() as other:
            other.setattr(owner, name, value)
            places.add(build.place())
    assert len(places) == 5


def both(call) -> list:
    """What a call returns or raises in two threads. Locks belong to open files, so threads compete as processes do."""
    found = []

    def run():
        try:
            found.append(call())
        except RuntimeError as error:
            found.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_one_compiles_and_the_other_waits(package, capsys):
    first, second = both(build.compiled)
    said = capsys.readouterr().err
    assert first == second and first.exists(), (first, second)
    assert said.count("compiling the C++ extension for torch") == 1 and said.count("waiting for it") == 1


def test_who_waits_for_a_failure_fails_with_it(package, capsys, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C.UTF-8")  # the language of compilers' messages
    (package / "_source" / "csrc" / "bindings.cpp").write_text("int broken = nothing_of_that_name;\n")
    first, second = both(build.compiled)
    said = capsys.readouterr().err
    assert first == second and "error: 'nothing_of_that_name' was not declared" in first
    assert said.count("compiling the C++ extension for torch") == 1
    assert [path.suffix for path in build.place().parent.iterdir()] == [".lock"]


def test_without_a_compiler(package, monkeypatch):
    monkeypatch.setenv("CXX", "/no/compiler")
    with pytest.raises(RuntimeError, match=r"there is no C\+\+ compiler that runs"):
        openmythos_kernels.build()
    assert extension.module is None and extension.reason == "it is not built"


@pytest.mark.parametrize("value, asked", [("", False), ("0", False), ("1", True)])
def test_the_first_import_compiles_where_that_is_asked_for(package, monkeypatch, value, asked):
    def compiled():
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr(build, "compiled", compiled)
    monkeypatch.setenv("OPENMYTHOS_BUILD", value)
    module, reason = extension._load()
    assert (
        module is None and "not built" in reason and ("building it now failed: there is no compiler" in reason) == asked
    )


def test_a_cache_that_cannot_be_written(package, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPENMYTHOS_CACHE", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="OPENMYTHOS_CACHE may name another folder"):
        openmythos_kernels.build()


def test_without_sources(package):
    shutil.rmtree(package / "_source")
    with pytest.raises(RuntimeError, match="sources are not installed"):
        openmythos_kernels.build()


def test_a_damaged_file_in_the_cache_is_a_reason(package):
    path = build.file(build.place())
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a shared object")
    module, reason = extension._load()
    assert module is None and "does not load" in reason and f"remove {path.parent}" in reason


def test_cuda_kernels_wait_for_the_next_process(package, capsys):
    """In this process other kernels have taken their places."""
    path = build.file(build.place())
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    (path.parent / build.RECORD).write_text('{"reason": "", "cuda": "8.0"}')
    assert openmythos_kernels.build() == path and extension.module is None
    assert "from the next process on" in capsys.readouterr().err


def test_does_nothing_where_it_is_loaded(package, monkeypatch):
    monkeypatch.setattr(extension, "module", torch)
    monkeypatch.setattr(build, "compiled", None)
    assert openmythos_kernels.build() == Path(torch.__file__)
