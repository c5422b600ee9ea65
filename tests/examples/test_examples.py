"""Every script in `examples/` runs, at sizes of a second or two."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
# file -> arguments, and words that its output must hold.
RUNS = {
    "swap_and_train.py": ("--steps 2 --tokens 16 --dim 64", ["reference", "accelerated", "apart"]),
    "generate.py": ("--steps 1 --new 4 --loops 3", ["def ", "bytes per token at 3 loops"]),
    "microbenchmark_a_kernel.py": ("--tokens 1 5 --rounds 1 --dim 32 --experts 4", ["MoEFFN", "faster"]),
    "time_the_depths.py": ("--loops 1 2 --cached 8 --tokens 1 --dim 64", ["loops", "ours"]),
    "train_from_python.py": ("--steps 2 --dim 64 --out OUT", ["held-out loss", "8 loops"]),
    "swap_with_accelerate.py": ("--steps 2", ["step 1: loss"]),
    "judge_a_fork.py": ("", ["ScaledExperts is a subclass of MoEFFN", "the same bits"]),
}


ON_RANKS = "swap_under_fsdp.py"


@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs(name, monkeypatch, capsys, tmp_path):
    if name == "swap_with_accelerate.py":
        pytest.importorskip("accelerate")
    arguments, words = RUNS[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments.replace("OUT", str(tmp_path)).split()])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(word in printed for word in words), printed
    assert torch.is_grad_enabled()


def test_the_example_for_ranks_runs_on_two():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(EXAMPLES / ON_RANKS), "--steps", "2"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=EXAMPLES.parent,
    )  # fmt: skip
    assert done.returncode == 0 and "step 1: loss" in done.stdout, done.stdout + done.stderr


def test_every_example_is_run_here_and_fits_a_page():
    scripts = {path.name: path.read_text().count("\n") for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() - {"rdt_in_one_file.py", ON_RANKS} == RUNS.keys()
    assert all(lines <= 60 for name, lines in scripts.items() if name in RUNS)
