"""Tables, figures and the page, from invented results."""

import re

import pytest

from benchmarks.models import HEADLINE
from benchmarks.report import requirements, tables, write
from benchmarks.report.page import page
from benchmarks.session import Requirement
from benchmarks.suites.depth import WORKLOADS, each, over_upstream
from benchmarks.suites.train import difference
from benchmarks.timing import speedup, spread

MACHINE = {
    "device": "CPU",
    "device_name": "Some <CPU> & more",
    "cpu": "Some <CPU> & more",
    "cores": 2,
    "threads": 2,
    "vectors": "AVX2",
    "copy_gb_per_s": 10.0,
    "gemm_gflop_per_s": 100.0,
    "torch": "2.13",
    "python": "3.12",
    "open-mythos": "0.5.0",
    "commit": "abc",
}


def depth_suite(missing):
    speed = {"upstream": 1.0, "reference": 0.9, "compiled": 0.8, "ours": 0.2}
    present = [name for name in speed if name not in missing]
    seconds = {
        work: {d: {n: [speed[n] * d * k for k in (1, 2, 3)] for n in present} for d in (1, 4)} for work in WORKLOADS
    }
    return {
        "model": HEADLINE,
        "workloads": WORKLOADS,
        "depths": [1, 4],
        "missing": missing,
        "seconds": seconds,
        "median": each(seconds, lambda s: {name: spread(values) for name, values in s.items()}),
        "speedup": each(seconds, over_upstream),
        "requirements": [],
    }


def train_suite():
    losses = {"reference": [3.0, 2.0, 1.5], "ours": [3.0, 2.0 + 1e-6, 1.5], "control": [3.0, 2.0, 1.5 + 1e-5]}
    seconds = {"reference": [2.0, 2.0, 2.0], "ours": [1.0, 1.0, 1.0]}
    return {
        "corpus": "text",
        "batch": [2, 8],
        "loops": 2,
        "losses": losses,
        "difference": difference(losses),
        "control": difference(losses, "control"),
        "seconds": seconds,
        "speedup": speedup(seconds["reference"], seconds["ours"]),
        "requirements": [],
    }


def make(missing=(), rows=(), quick=False):
    suites = {"depth": depth_suite(dict(missing)), "train": train_suite()}
    suites["train"]["requirements"] = [row.as_dict() for row in rows]
    return {"machine": MACHINE, "quick": quick, "corpus": "text", "seconds": 1.0, "suites": suites}


def texts(results):
    return "\n".join(table.text() for table in tables(results))


def test_train_table_shows_the_distance_of_the_control():
    text = texts(make())
    assert "weights one ulp apart" in text and "largest distance of the control so far" in text
    assert [f"{value:.1e}" for value in train_suite()["control"]] == ["0.0e+00", "0.0e+00", "1.0e-05"]


def test_requirements_are_bounds_that_nan_and_none_never_pass():
    def passed(measured, **kind):
        return Requirement("row", 2.0, measured, "x", timing=True, **kind).passed

    assert passed(2.0) and passed(3.0) and not passed(1.9)
    assert passed(2.0, higher=False) and not passed(2.1, higher=False)
    assert not passed(float("nan")) and not passed(float("nan"), higher=False) and not passed(None)


@pytest.mark.parametrize("quick, verdict", [(False, "FAIL"), (True, "missed (not enforced)")])
def test_verdict_of_a_missed_timing_requirement(quick, verdict):
    results = make(rows=[Requirement("decode", 8.0, 5.0, "x open-mythos", timing=True)], quick=quick)
    assert tables(results)[-1].rows[0][-1] == verdict
    assert len(requirements(results)) == 1


def test_missing_contenders_have_a_reason():
    assert "reference + torch.compile: no compiler here." in texts(make(missing={"compiled": "no compiler here"}))


def test_depth_table_shows_medians_and_ratios():
    table = next(t for t in tables(make()) if t.title.startswith("Decode"))
    assert table.rows[-1] == ("ours (fast modules)", "400.0 (5.00x)", "1600.0 (5.00x)")


def test_page_is_self_contained(tmp_path):
    pytest.importorskip("matplotlib")
    files = write(make(rows=[Requirement("row", 1.0, 2.0, "x", timing=True)]), tmp_path)
    assert sorted(path.name for path in files) == ["depth.png", "index.html", "results.json", "train.png"]
    html = (tmp_path / "index.html").read_text()
    assert html.count("data:image/png;base64,") == 4  # two figures, light and dark
    assert "Some &lt;CPU&gt; &amp; more" in html
    assert "<script" not in html and "<link" not in html and "@import" not in html and "url(" not in html
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    for address in re.findall(r'(?:src|srcset|href)="([^"]*)"', html):
        assert address.startswith("data:")


def test_page_without_figures_says_so():
    assert "no figures: because" in page(make(), {}, "no figures: because")


def test_labels_are_spread_in_order():
    plots = pytest.importorskip("benchmarks.report.plots")
    moved = plots.spread_labels({"a": 0.50, "b": 0.51, "c": 0.52, "far": 0.9}, gap=0.1)
    assert moved == pytest.approx({"a": 0.41, "b": 0.51, "c": 0.61, "far": 0.9})
