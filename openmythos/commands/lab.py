"""Claims about looped models as experiments that can fail."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from openmythos.lab import page, verdicts
from openmythos.lab.catalog import chosen
from openmythos.lab.compare import compare
from openmythos.lab.experiment import SCALES, Experiment
from openmythos.lab.runner import Job, Report, execute
from openmythos.lab.store import Store

NOTE = """
openmythos lab compare A B: verdicts and figures of two folders side by side.

A run that has a result is not computed again with --resume; what is killed loses the runs in progress alone.
--resume --minutes 0 judges what there is."""


def main(arguments: Sequence[str]) -> None:
    """`openmythos lab [NAME ...] [options]` or `openmythos lab compare A B`; writes OUT/index.html"""
    if list(arguments[:1]) == ["compare"]:
        if len(arguments) != 3 or arguments[1].startswith("-"):
            raise ValueError("usage: openmythos lab compare A B; each is the folder of a run of the laboratory")
        print(compare(arguments[1], arguments[2]))
        return
    given = _parser().parse_args(list(arguments))
    experiments = chosen(given.names)
    for name, least in (("seeds", 1), ("minutes", 0), ("jobs", 1)):
        value = getattr(given, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name} {value}: must be >= {least}")
    for one in experiments:
        if given.scale not in one.scales:
            raise ValueError(f"--scale {given.scale}: {one.name} has {', '.join(s for s in SCALES if s in one.scales)}")
    try:
        import matplotlib  # noqa: F401  (for the plots at the end: better to miss it now)
    except ImportError as error:
        raise ImportError("the laboratory's page needs matplotlib: pip install matplotlib") from error
    report = investigate(
        experiments, Path(given.out), given.scale, given.seeds, given.minutes, given.jobs, given.resume
    )
    if report.failed:
        sys.exit(1)


def investigate(
    experiments: Sequence[Experiment],
    out: Path,
    scale: str = "small",
    seeds: int | None = None,
    minutes: float | None = None,
    jobs: int = 2,
    resume: bool = False,
) -> Report:
    """Runs experiments, judges them, and writes verdicts and page.

    Raises:
        ValueError: `out` has results of these runs and `resume` is False.
    """
    store = Store(out)
    numbers = {
        one.name: [one.first_seed + i for i in range(one.seeds if seeds is None else seeds)] for one in experiments
    }
    planned = [[Job(one.name, run) for run in one.runs(one.scales[scale], numbers[one.name])] for one in experiments]
    every = _in_order(planned, minutes is not None)
    kept = sum(store.result(job.experiment, job.run) is not None for job in every)
    if kept and not resume:
        raise ValueError(
            f"--out {out}: holds results of {kept} of these runs; keep them with --resume, or take another"
        )
    report = _watched(every, kept, store, jobs, minutes)
    entries, plots = verdicts.read(out), {}
    for one in experiments:
        entries[one.name] = verdicts.judged(one, scale, numbers[one.name], store, report.failed)
        _keep(out, one.name, page.drawing(one, scale, numbers[one.name], store))
    verdicts.write(out, entries)
    entries = verdicts.read(out)
    plots = {name: _kept(out, name) for name in entries}
    print(_table(entries))
    for name, message in report.failed.items():
        print(f"\n{name} failed: {message}", file=sys.stderr)
    print(page.write(out, entries, plots))
    return report


def _in_order(planned: Sequence[Sequence[Job]], interleaved: bool) -> list[Job]:
    """Runs one experiment after the other; where time is short, equal shares of all at any moment."""
    ranked = [(i / len(jobs) if interleaved else 0.0, job) for jobs in planned for i, job in enumerate(jobs)]
    return [job for _, job in sorted(ranked, key=lambda pair: pair[0])]


def _watched(every: list[Job], kept: int, store: Store, jobs: int, minutes: float | None) -> Report:
    """Executes with a progress bar. An interrupt ends the runs in progress; what there is then is judged."""
    shape = "{percentage:3.0f}%|{bar}| [{elapsed}<{remaining}] {postfix}"
    with tqdm(total=len(every), initial=kept, bar_format=shape, dynamic_ncols=True) as bar:

        def watch(done: float, names: list[str]) -> None:
            bar.n = kept + done
            bar.set_postfix_str(f"{int(kept + done)} of {len(every)} runs; {', '.join(names)}")

        try:
            return execute(every, store, jobs, None if minutes is None else 60 * minutes, watch)
        except KeyboardInterrupt:
            print("interrupted; the same command with --resume goes on", file=sys.stderr)
            return Report()


def _plot_file(out: Path, name: str) -> Path:
    return out / "plots" / f"{name}.svg"


def _keep(out: Path, name: str, svg: str) -> None:
    path = _plot_file(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg)


def _kept(out: Path, name: str) -> str:
    path = _plot_file(out, name)
    return path.read_text() if path.exists() else ""


def _table(entries: dict[str, dict]) -> str:
    lines = []
    for name, entry in entries.items():
        verdict = entry["outcome"] + " (quick)" * entry["quick"]
        lines.append(f"{entry['number']:<4}{name:<16}{verdict:<18}{entry['because']}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "openmythos lab", description=__doc__, epilog=NOTE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments; default: all")
    parser.add_argument("--seeds", type=int, metavar="N", help="N of its seeds; default: each experiment's own number")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no run that would end later")
    parser.add_argument(
        "--scale", choices=SCALES, default="small", help="smoke is for tests; medium and large for GPUs"
    )
    parser.add_argument("--jobs", type=int, metavar="N", default=min(2, os.cpu_count() or 1), help="runs side by side")
    parser.add_argument("--resume", action="store_true", help="keep the results that the folder has")
    parser.add_argument("--out", default="results/lab", help="folder for results, verdicts and page")
    return parser
