"""`make gpu-check`: the order of its steps, its report and its exit status. The steps themselves need a GPU."""

import pytest
import torch

from tools import gpu_check


@pytest.mark.parametrize("broken, status", [(None, 0), ("verify", 1), ("every kernel", 1), ("benchmarks", 1)])
def test_nothing_is_measured_after_a_failure(tmp_path, broken, status):
    ran = []

    def run(arguments):
        ran.append(next(name for name, step in gpu_check.STEPS.items() if step == arguments))
        return (7 if ran[-1] == broken else 0), f"table of {ran[-1]}"

    names, out = list(gpu_check.STEPS), tmp_path / "new" / "report.md"
    assert gpu_check.check(out, "- device: X", run) == status
    assert ran == (names[: names.index(broken) + 1] if broken else names)
    report = out.read_text()
    assert "- device: X" in report and all(f"table of {name}" in report for name in ran)
    assert report.count("passed") == len(ran) - status and report.count("FAILED (status 7)") == status
    assert report.count(": not run") == len(names) - len(ran)


def test_a_step_is_a_process_whose_output_is_kept():
    assert gpu_check.run(["-c", "print('said'); raise SystemExit(5)"]) == (5, "said\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path, capsys):
    assert gpu_check.main(tmp_path / "report.md") == gpu_check.NO_GPU == 3
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "report.md").exists()
