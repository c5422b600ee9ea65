"""A CUDA toolkit that does not work with this PyTorch costs the CUDA kernels alone, and is named."""

from pathlib import Path

import pytest
import torch

from building import recipe

COMPILES = '[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.1" && exit 0\n{rest}'
CASES = {
    "works": (COMPILES.format(release="13.1", rest="exit 0"), ""),
    "another version": (COMPILES.format(release="12.8", rest="exit 0"), "is of CUDA 12, this PyTorch of CUDA 13.0"),
    "no headers": (
        COMPILES.format(release="13.0", rest='echo "probe.cu:1:10: fatal error: cuda_runtime_api.h: none" >&2; exit 1'),
        "compiles nothing: probe.cu:1:10: fatal error: cuda_runtime_api.h: none",
    ),
    "no nvcc": ("", "nvcc was not found"),
}


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A PyTorch for CUDA 13.0, and the folder of a toolkit without anything."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(recipe, "CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    recipe.without_cuda.cache_clear()
    yield tmp_path
    recipe.without_cuda.cache_clear()


@pytest.mark.parametrize("case", CASES)
def test_why_there_are_no_cuda_kernels(case, toolkit):
    script, reason = CASES[case]
    if script:
        nvcc = Path(toolkit, "bin", "nvcc")
        nvcc.write_text(f"#!/bin/sh\n{script}\n")
        nvcc.chmod(0o755)
    assert reason in recipe.without_cuda() if reason else recipe.without_cuda() == ""
    assert bool(recipe.nvcc()) == (reason == "")


def test_the_cpu_kernels_are_declared_without_it(toolkit, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.warns(UserWarning, match="no CUDA kernels are built, as nvcc was not found"):
        sources = recipe.extension().sources
    assert any("csrc/cpu" in name for name in sources) and not any("csrc/cuda" in name for name in sources)
