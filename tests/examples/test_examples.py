"""Every script in `examples/` runs, at sizes of a second or two."""

import runpy
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
    "judge_a_fork.py": ("", ["ScaledExperts is a subclass of MoEFFN", "the same bits"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs(name, monkeypatch, capsys):
    arguments, words = RUNS[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(word in printed for word in words), printed
    assert torch.is_grad_enabled()


def test_every_example_is_run_here_and_fits_a_page():
    scripts = {path.name: path.read_text().count("\n") for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() - {"rdt_in_one_file.py"} == RUNS.keys()
    assert all(lines <= 60 for name, lines in scripts.items() if name in RUNS)
