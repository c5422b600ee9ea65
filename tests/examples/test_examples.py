"""Every script in `examples/` runs, at sizes of a second or two."""

import importlib.util
import os
import re
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


@pytest.fixture
def on_ranks(upstream, tmp_path):
    """on_ranks(ranks, options...): what the example for ranks prints."""
    # The package imports its tokenizer's library, which no model needs.
    stub = tmp_path / "stub"
    stub.mkdir()
    if importlib.util.find_spec("transformers") is None:
        (stub / "transformers.py").write_text("AutoTokenizer = None\n")
    path = os.pathsep.join([str(stub), *filter(None, [os.environ.get("PYTHONPATH")])])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

    def run(ranks, *options):
        done = subprocess.run(
            [*torchrun, f"--nproc-per-node={ranks}", str(EXAMPLES / ON_RANKS), *options],
            capture_output=True, text=True, cwd=EXAMPLES.parent, timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def losses(printed):
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]


def test_the_example_for_ranks_has_the_losses_and_weights_of_the_script_without_the_swap(on_ranks, tmp_path):
    ours, theirs = str(tmp_path / "ours.pt"), str(tmp_path / "theirs.pt")
    found = losses(on_ranks(2, "--steps", "3", "--out", ours))
    assert len(found) == 3
    assert found == pytest.approx(losses(on_ranks(2, "--steps", "3", "--out", theirs, "--reference")), abs=1e-5)
    ours, theirs = torch.load(ours), torch.load(theirs)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=2e-3, rtol=0, msg=name)  # 3 steps of AdamW at lr 3e-3


def test_ranks_that_halt_apart_have_the_losses_of_each_alone(on_ranks, tmp_path):
    """Without the swap rank 0 leaves the loop after its first pass, rank 1 gathers weights in three more, and gloo
    finds their sizes unequal."""
    file = tmp_path / "weights.pt"
    on_ranks(1, "--steps", "0", "--out", str(file))
    weights = torch.load(file)
    for name in ("embed.weight", "head.weight"):
        weights[name][ord("a")] += 0.05
        weights[name][ord("b")] -= 0.05
    weights["recurrent.act.halt.weight"].fill_(4.0)
    weights["recurrent.act.halt.bias"].zero_()
    weights["recurrent.injection.B"].fill_(1.0)
    torch.save(weights, file)
    texts = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for text in texts:
        Path(text).write_text(Path(text).stem * 1000)
    common = "--weights", str(file), "--text"
    together = losses(on_ranks(2, "--steps", "2", *common, *texts))
    alone = [losses(on_ranks(1, "--steps", "1", "--reference", *common, text))[0] for text in texts]
    assert len(together) == 2 and together[0] == pytest.approx(sum(alone) / 2, abs=1e-5)


def test_every_example_is_run_here_and_fits_a_page():
    scripts = {path.name: path.read_text().count("\n") for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() - {"rdt_in_one_file.py", ON_RANKS} == RUNS.keys()
    assert all(lines <= 60 for name, lines in scripts.items() if name in RUNS)
