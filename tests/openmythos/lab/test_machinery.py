"""The laboratory's machinery, on experiments that compute nothing worth knowing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from openmythos.commands import lab
from openmythos.lab import page, verdicts
from openmythos.lab.catalog import catalog, chosen
from openmythos.lab.compare import compare
from openmythos.lab.experiment import SCALES, Run
from openmythos.lab.runner import Job, execute
from openmythos.lab.store import Store, save
from tests.openmythos.lab import made_up

ROOT = Path(__file__).parents[3]


def files(folder):
    return sorted(path for path in folder.glob("runs/*/*") if path.suffix == ".json")


def fill(folder, experiment, seeds, scale="small"):
    """Results without processes."""
    store = Store(folder)
    for run in experiment.runs(experiment.scales[scale], seeds):
        path = store.path(experiment.name, run)
        if not path.exists():
            save(path, run, run.compute(run.settings, lambda done, of: None), 1.0, {"torch": "2"})
    return store


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One run of the laboratory: two experiments, of which one has a run that raises and one that dies."""
    folder = tmp_path_factory.mktemp("lab")
    bad = made_up.experiment("bad", "E2", seeds=2)
    runs = bad.runs

    def with_failures(settings, seeds):
        raises, dies = ({**settings, "seed": 9, word: True} for word in ("fails", "dies"))
        return [*runs(settings, seeds), Run("raises", raises, made_up.compute), Run("dies", dies, made_up.compute)]

    object.__setattr__(bad, "runs", with_failures)
    report = lab.investigate([made_up.experiment(), bad], folder)
    return folder, report


def test_what_fails_stops_nothing_else(done):
    folder, report = done
    assert len(report.done) == 5 and not report.left
    assert "it diverged" in report.failed["bad/raises"] and "-9" in report.failed["bad/dies"]
    entries = verdicts.read(folder)
    assert entries["bad"]["missing"] == ["raises", "dies"] and entries["bad"]["outcome"] == "holds"
    assert entries["bad"]["failed"]["bad/raises"] == "ArithmeticError: it diverged"
    assert len(files(folder)) == 5


def test_a_run_has_one_thread(done):
    folder, _ = done
    assert {json.loads(path.read_text())["found"]["threads"] for path in files(folder)} == {1}


def test_results_are_kept_only_if_asked(done):
    folder, _ = done
    with pytest.raises(ValueError, match="holds results of 3 of these runs; keep them with --resume"):
        lab.investigate([made_up.experiment()], folder)
    before = {path: path.stat().st_mtime_ns for path in files(folder)}
    report = lab.investigate([made_up.experiment()], folder, resume=True)
    assert not report.done and {path: path.stat().st_mtime_ns for path in files(folder)} == before
    assert set(verdicts.read(folder)) == {"doubling", "bad"}, "another experiment's verdict stays"


def test_the_page_is_whole(done):
    folder, _ = done
    text = (folder / page.FILE).read_text()
    for words in (
        "Doubling &lt;numbers&gt;",
        "Twice a number is larger &amp; not smaller.",
        "No doubled number exceeds its number.",
        "the largest value is 4 &lt; &amp; &gt;",
        "Anything else.",
        "openmythos lab doubling --scale small --seeds 3",
        "torch 2.",
        "full run, scale small, 3 seeds",
        "2 of 4 runs are missing",
        "ArithmeticError: it diverged",
    ):
        assert words in text, words
    assert "<numbers>" not in text and "< & >" not in text
    assert text.count("<svg") == 2 and text.count('class="badge holds"') == 4
    assert not re.search(r"(src|href)=\"(?!#)", text.replace("xlink:href", "")), "it needs no other file"
    seeds = re.search(r'id="doubling".*?</section>', text, re.S).group()
    assert all(f"<tr><td>{seed}</td><td>{2 * seed}</td></tr>" in seeds for seed in range(3)), "every seed is shown"


def test_a_killed_laboratory_loses_the_runs_in_progress_alone(tmp_path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom openmythos.commands.lab import investigate\n"
        "from tests.openmythos.lab.made_up import experiment\n"
        "if __name__ == '__main__':\n"
        "    slow = experiment('slow', 'E2', sleeps=int(sys.argv[2]))\n"
        "    investigate([experiment(), slow], Path(sys.argv[1]), resume=True)\n"
    )
    (tmp_path / "go.py").write_text(script)
    command = [sys.executable, str(tmp_path / "go.py"), str(tmp_path / "lab"), "1000"]
    how = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **how)
    try:
        until = time.monotonic() + 240
        while len(files(tmp_path / "lab")) < 3 and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(0.5)  # the slow ones are in progress
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    kept = files(tmp_path / "lab")
    assert [path.parent.name for path in kept] == ["doubling"] * 3
    before = {path: path.stat().st_mtime_ns for path in kept}
    store = Store(tmp_path / "lab")
    experiment = made_up.experiment()
    jobs = [Job("doubling", run) for run in experiment.runs(experiment.scales["small"], range(4))]
    report = execute(jobs, store, workers=1)
    assert [str(job) for job, _ in report.done] == ["doubling/seed3"]
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_time_that_is_up_begins_nothing(tmp_path):
    experiment = made_up.experiment()
    jobs = [Job("doubling", run) for run in experiment.runs({}, range(3))]
    report = execute(jobs, Store(tmp_path), seconds=0)
    assert not report.done and len(report.left) == 3
    report = lab.investigate([experiment], tmp_path, minutes=0)
    entry = verdicts.read(tmp_path)["doubling"]
    assert entry["outcome"] == "undecided" and len(entry["missing"]) == 3 and (tmp_path / page.FILE).exists()


def test_with_little_time_experiments_advance_together():
    first, second = (
        [Job(name, Run(str(i), {}, made_up.compute)) for i in range(n)] for name, n in (("a", 4), ("b", 2))
    )
    order = [str(job) for job in lab._in_order([first, second], True)]
    assert order == ["a/0", "b/0", "a/1", "a/2", "b/1", "a/3"]
    assert lab._in_order([first, second], False) == first + second


def test_other_settings_are_another_run(tmp_path):
    store = Store(tmp_path)
    a, b = (made_up.experiment(factor=factor).runs({"factor": factor}, [0])[0] for factor in (1, 2))
    save(store.path("doubling", a), a, {"value": 1}, 1.0, {})
    assert store.result("doubling", a).found == {"value": 1} and store.result("doubling", b) is None
    assert store.result("other", a) is None


def test_a_damaged_result_is_named(tmp_path):
    store, run = Store(tmp_path), made_up.experiment().runs({}, [0])[0]
    path = store.path("doubling", run)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"seed0-.*json: not the result of a run"):
        store.result("doubling", run)


def test_what_is_not_json_leaves_no_file(tmp_path):
    run = made_up.experiment().runs({}, [0])[0]
    with pytest.raises(TypeError):
        save(tmp_path / "runs" / "x.json", run, {"value": object()}, 1.0, {})
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("seeds, scale, quick", [(3, "small", False), (2, "small", True), (3, "smoke", True)])
def test_few_seeds_are_quick(tmp_path, seeds, scale, quick):
    experiment = made_up.experiment(least=3)
    store = fill(tmp_path, experiment, range(seeds), scale)
    entry = verdicts.judged(experiment, scale, range(seeds), store, {})
    assert entry["quick"] is quick and entry["outcome"] == ("holds" if seeds == 3 else "rejected")
    assert entry["figures"] == {"largest": 2 * (seeds - 1), "missing": None}
    verdicts.write(tmp_path, {"doubling": entry})
    text = page.page(verdicts.read(tmp_path), {})
    assert ('class="quick"' in text) is quick


def test_compare(tmp_path, capsys):
    for folder, least in (("a", 0), ("b", 100)):
        experiment = made_up.experiment(least=least)
        seeds = range(2 if folder == "a" else 4)
        store = fill(tmp_path / folder, experiment, seeds)
        entries = {"doubling": verdicts.judged(experiment, "small", seeds, store, {})}
        if folder == "b":
            entries["more"] = {**entries["doubling"], "number": "E10"}
        verdicts.write(tmp_path / folder, entries)
    lab.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1][:2] == ["*", "doubling"] and {"holds", "rejected"} <= set(lines[1])
    assert ["largest", "2", "6", "+4"] in lines and ["missing", "-", "-"] in lines
    assert lines[4][:3] == ["*", "more", "-"]
    with pytest.raises(ValueError, match=r"B = .*nowhere: holds no verdicts\.json"):
        compare(tmp_path / "a", tmp_path / "nowhere")


def test_the_catalog_and_its_rules():
    known = catalog()
    assert [one.number for one in known.values()] == sorted(
        (one.number for one in known.values()), key=lambda number: int(number[1:])
    )
    for name, one in known.items():
        assert name == one.name and one.claim and one.rule and one.limits and one.seeds >= 1
        assert {"smoke", "small"} <= set(one.scales) <= set(SCALES)
        for scale, settings in one.scales.items():
            runs = one.runs(settings, [0, 1])
            assert json.loads(json.dumps([run.settings for run in runs])) == [run.settings for run in runs]
            assert len({run.key for run in runs}) == len(runs), scale
    with pytest.raises(ValueError, match="NAME = nothing: must be one of "):
        chosen(["nothing"])


@pytest.mark.parametrize(
    "arguments, message",
    [(["--seeds", "0"], "--seeds 0: must be >= 1"), (["--minutes", "-1"], "--minutes"), (["compare", "a"], "usage: ")],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lab.main(arguments)
