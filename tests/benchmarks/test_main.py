"""The command line with its cheapest suite, and its exit status."""

import json

import pytest

import benchmarks.__main__ as command
from benchmarks import machine
from benchmarks.session import Requirement


def test_quick_cache_suite_writes_results(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "GEMM_SIZE", 64)
    assert command.main(["--quick", "--only", "cache", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["suites"]) == ["cache"] and results["machine"]["torch"]
    rows = results["suites"]["cache"]["requirements"]
    assert len(rows) == 3 and all(row["passed"] and row["measured"] <= 1 / 14 for row in rows)
    assert results["suites"]["cache"]["rows"]["mythos_1b"]["ours"] == 4 * (256 + 32)
    assert (tmp_path / "index.html").exists()
    assert "pass" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("suite, rows", [("loop", 7), ("moe", 17), ("mla", 18)])
def test_quick_suites_that_use_separate_processes(tmp_path, suite, rows):
    assert command.main(["--quick", "--only", suite, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["suites"][suite]["requirements"]) == rows


@pytest.mark.parametrize("quick, timing, status", [(False, True, 1), (True, True, 0), (True, False, 1)])
def test_exit_status_of_a_missed_requirement(tmp_path, monkeypatch, quick, timing, status):
    row = Requirement("row", 2.0, 1.0, "x", timing=timing).as_dict()
    described = dict.fromkeys(
        ["device", "device_name", "cpu", "cores", "threads", "vectors", "torch", "python", "open-mythos", "commit"], "?"
    )
    monkeypatch.setattr(command, "describe", lambda _: {**described, "copy_gb_per_s": 1.0, "gemm_gflop_per_s": 1.0})
    suite = {"rows": {}, "dtype": "float32", "tokens": 1, "requirements": [row]}
    monkeypatch.setattr(command, "SUITES", {"cache": lambda session: suite})
    assert command.main(["--out", str(tmp_path), *(["--quick"] if quick else [])]) == status


def test_unknown_suite_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "nonsense"])
    assert "invalid choice" in capsys.readouterr().err
