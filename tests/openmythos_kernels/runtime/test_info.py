"""`python -m openmythos_kernels info` describes the installation, and survives a broken one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import openmythos_kernels
from openmythos_kernels import __main__
from openmythos_kernels.runtime import backends, extension, info


def test_names_versions_devices_extension_and_ops():
    text = info.describe()
    assert torch.__version__ in text and extension.module.compiler in text
    for op in backends.OPS:
        assert f"{op} on cpu" in text
    for name, exempt in backends.EXEMPTIONS.items():
        assert name in text and exempt.why in text


def test_says_what_is_wrong_without_the_extension(monkeypatch):
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "reason", "built for another torch")
    text = info.describe()
    compiled = sum("cpu" in kinds for kinds in backends.OPS.values())
    assert "NOT loaded" in text and text.count("built for another torch") == 1 + compiled


@pytest.mark.parametrize(
    "reason, status, said", [(None, 0, "extension is /x"), ("no compiler", 1, "NOT built: no compiler")]
)
def test_the_build_command(monkeypatch, capsys, reason, status, said):
    def build():
        if reason:
            raise RuntimeError(reason)
        return Path("/x")

    monkeypatch.setattr(extension, "build", build)
    monkeypatch.setattr(sys, "argv", ["openmythos_kernels", "build"])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == status and said in capsys.readouterr().out


def test_a_failing_section_does_not_take_the_others_down(monkeypatch):
    def broken(package):
        raise OSError("no metadata")

    monkeypatch.setattr(info, "_version", broken)
    text = info.describe()
    assert "versions: could not be read (OSError: no metadata)" in text and "C++ extension" in text


def test_command_works_with_a_corrupt_extension_file(tmp_path):
    """In a copy of the packages whose compiled file is garbage the command runs and says so."""
    root = Path(openmythos_kernels.__file__).parents[1]
    for package in ("openmythos", "openmythos_kernels"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    name = Path(extension.module.__file__).name
    (tmp_path / "openmythos_kernels" / name).write_bytes(b"not a shared object")
    run = subprocess.run(
        [sys.executable, "-m", "openmythos_kernels", "info"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "NOT loaded" in run.stdout and "does not load" in run.stdout
