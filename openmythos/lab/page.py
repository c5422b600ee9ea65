"""The laboratory's page: one file of HTML that holds everything it shows."""

from __future__ import annotations

import io
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from openmythos.lab.experiment import Experiment
from openmythos.lab.statistics import seeds_said
from openmythos.lab.store import Store
from openmythos.lab.verdicts import present
from openmythos.training.files import replacing

FILE = "index.html"


def drawing(experiment: Experiment, scale: str, seeds: list[int], store: Store) -> str:
    """The experiment's plot as SVG; empty without results."""
    settings = experiment.scales[scale]
    results = present(experiment.name, experiment.runs(settings, seeds), store)
    if not results:
        return ""
    return plotted(experiment.name, lambda axes: experiment.draw(settings, results, axes))


def plotted(name: str, draw: Callable[[Any], None]) -> str:
    """One picture as SVG, the same text for the same picture.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def write(folder: Path, entries: dict[str, dict], plots: dict[str, str]) -> Path:
    """Writes the page of these entries, as `verdicts.judged` makes them, with a plot for each that has one."""
    path = folder / FILE
    with replacing(path) as part:
        part.write_text(page(entries, plots))
    return path


def page(entries: dict[str, dict], plots: dict[str, str]) -> str:
    """The page as text."""
    sections = "\n".join(_section(name, entry, plots.get(name, "")) for name, entry in entries.items())
    counts = {word: sum(entry["outcome"] == word for entry in entries.values()) for word in OUTCOMES}
    tally = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    rows = "\n".join(
        f"<tr><td>{escape(entry['number'])}</td>"
        f'<td><a href="#{escape(name)}">{escape(entry["title"])}</a></td>'
        f"<td>{_badge(entry)}</td><td>{escape(entry['because'])}</td></tr>"
        for name, entry in entries.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>The laboratory of looped models</title><style>{STYLE}</style></head><body><main>
<h1>The laboratory of looped models</h1>
<p class="lead">Claims about models that loop a block over their state, each with the rule that rejects it. Claim, rule
and thresholds were written down before a run started. Verdicts: {tally}.</p>
<table class="verdicts"><thead><tr><th></th><th>experiment</th><th>verdict</th><th>because</th></tr></thead>
<tbody>
{rows}
</tbody></table>
<p class="note"><b>holds</b>: the claim passed its test. <b>rejected</b>: its rule applies. <b>undecided</b>: results
are missing, or neither applies. <b>quick</b>: fewer seeds than a full run has, so the verdict is a first look.</p>
{sections}
</main></body></html>
"""


OUTCOMES = ("holds", "rejected", "undecided")


def _badge(entry: dict) -> str:
    quick = ' <span class="quick">quick</span>' if entry["quick"] else ""
    return f'<span class="badge {entry["outcome"]}">{entry["outcome"]}</span>{quick}'


def _section(name: str, entry: dict, plot: str) -> str:
    missing = f"; {len(entry['missing'])} of {entry['runs']} runs are missing" if entry["missing"] else ""
    failed = "".join(f"<li><b>{escape(run)}</b>: {escape(why)}</li>" for run, why in entry["failed"].items())
    facts = (
        f"{'quick' if entry['quick'] else 'full'} run, scale {entry['scale']}, "
        f"{seeds_said(len(entry['seeds']))}{missing}; "
        f"{entry['seconds'] / 60:.1f} minutes of one thread; {entry['date']}; {entry['machine']}; "
        + ", ".join(f"{what} {version}" for what, version in entry["versions"].items())
    )
    figures = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{_cell(value)}</dd></div>" for key, value in entry["figures"].items()
    )
    return f"""<section id="{escape(name)}">
<h2><span class="number">{escape(entry["number"])}</span> {escape(entry["title"])} {_badge(entry)}</h2>
<dl class="statement"><dt>Claim</dt><dd>{escape(entry["claim"])}</dd>
<dt>Rejected if</dt><dd>{escape(entry["rule"])}</dd>
<dt>Because</dt><dd>{escape(entry["because"])}</dd></dl>
<figure>{plot}</figure>
{f'<dl class="figures">{figures}</dl>' if figures else ""}
<details open><summary>All runs</summary>{_table(entry["columns"], entry["rows"])}</details>
{f'<p>Failed runs:</p><ul class="failed">{failed}</ul>' if failed else ""}
<h3>What it does not show</h3><p>{escape(entry["limits"])}</p>
<h3>Reproduce</h3><pre>{escape(entry["command"])}</pre>
<p class="note">{escape(facts)}. Each run's JSON: runs/{escape(name)}/.</p>
</section>"""


def _table(columns: list[str], rows: list[list]) -> str:
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="runs"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


STYLE = """
:root { --ink: #1d2330; --soft: #5c6575; --line: #dfe3ea; --paper: #fff; --ground: #f5f6f9; --link: #2f55b8;
  --holds: #1a7f4b; --rejected: #b3261e; --undecided: #8a6100; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; margin: 0 0 .5rem; } h2 { font-size: 1.35rem; margin: 0 0 1rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
.lead { font-size: 1.1rem; color: var(--soft); max-width: 46rem; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-size: .8rem; color: var(--soft); font-weight: 600; }
th, td { padding: .45rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
.verdicts, section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.verdicts { border-collapse: separate; border-spacing: 0; margin: 1.5rem 0 .5rem; }
.verdicts td:nth-child(3) { white-space: nowrap; }
.runs { font-size: .85rem; } .wide { overflow-x: auto; }
section { padding: 1.5rem 1.5rem 1rem; margin-top: 1.75rem; }
.number { color: var(--soft); font-weight: 400; margin-right: .25rem; }
.badge { color: #fff; border-radius: 99px; padding: .1rem .6rem; font-size: .8rem; font-weight: 600; }
.holds { background: var(--holds); } .rejected { background: var(--rejected); }
.undecided { background: var(--undecided); }
.quick { border: 1px solid var(--line); border-radius: 99px; padding: .05rem .5rem; font-size: .75rem;
  color: var(--soft); font-weight: 400; }
.statement { display: grid; grid-template-columns: 7rem 1fr; gap: .35rem 1rem; margin: 0; }
.statement dt { color: var(--soft); } .statement dd { margin: 0; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: .5rem 0 1rem; }
.figures dt { color: var(--soft); font-size: .8rem; } .figures dd { margin: 0; font-weight: 600; }
figure { margin: 1.25rem 0; } figure svg { width: 100%; max-width: 46rem; height: auto; display: block; margin: auto; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
pre { background: var(--ground); padding: .6rem .8rem; border-radius: 6px; overflow-x: auto; }
.note { color: var(--soft); font-size: .85rem; } .failed { color: var(--rejected); font-size: .85rem; }
"""
