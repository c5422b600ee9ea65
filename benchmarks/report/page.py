"""One self-contained HTML page."""

from __future__ import annotations

from base64 import b64encode
from html import escape

from benchmarks.report.tables import Table, tables
from benchmarks.report.theme import COLORS

CAPTIONS = {
    "depth": "Training step, prefill and decode by loop depth; the band holds the middle half of the samples.",
    "train": "Training runs from one seed on equal batches; the first 50 steps are shaded. The gray distance is the "
    "control's: the reference itself, trained from weights one unit in the last place away.",
}

METHOD = (
    "Contenders hold equal weights and take turns, round after round; a ratio is formed within each round, and shown "
    "as the median over rounds with its range. Results are compared before speed is measured. Where depth is measured, "
    "the halting head is fixed so that no position halts. The cache is rewound after every decoded token, so all "
    "samples have the same cache length. A training step is forward, loss, backward, clipping and fused AdamW. Each "
    "row of the suites loop, moe and mla is measured in a separate process. Every raw sample is in results.json."
)

STYLE = """
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
body {{ margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main {{ max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }}
h1 {{ font-size: 1.75rem; margin: 0 0 .25rem; }}
h2 {{ font-size: 1.1rem; margin: 2.25rem 0 .6rem; }}
p {{ color: var(--faint); margin: .5rem 0; max-width: 60rem; }}
figure {{ margin: 2rem 0; }}
figcaption {{ color: var(--faint); font-size: .9rem; }}
img {{ width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; }}
.scroll {{ overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }}
table {{ border-collapse: collapse; width: 100%; font-size: .92rem; }}
th, td {{ padding: .45rem .8rem; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }}
th:first-child, td:first-child {{ text-align: left; }}
thead {{ background: var(--panel); }}
th {{ font-weight: 600; color: var(--faint); }}
tbody tr {{ border-top: 1px solid var(--line); }}
tr.best td {{ font-weight: 600; color: var(--ours); }}
td.pass {{ color: var(--pass); font-weight: 600; }}
td.fail {{ color: var(--fail); font-weight: 600; }}
"""


def page(results: dict, figures: dict, why_no_figures: str) -> str:
    """The page as HTML.

    Args:
        figures: name -> theme -> PNG bytes.
        why_no_figures: shown in place of figures, or "".
    """
    machine = results["machine"]
    machine_first, *others = tables(results)
    ordered = [*others[-1:], *others[:-1], machine_first]  # the requirements first, the machine last
    pictures = "".join(_figure(name, by_theme) for name, by_theme in figures.items())
    head, *rest = [_table(table) for table in ordered]
    quick = " (quick run)" if results["quick"] else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>OpenMythos Kernels: measured</title><style>{_style()}</style></head><body><main>
<h1>OpenMythos Kernels, measured{quick}</h1>
<p>{escape(machine["device"])} figures from {escape(machine["device_name"])}, threads: {machine["threads"]},
torch {escape(machine["torch"])}, commit {escape(machine["commit"])}; {results["seconds"]:.0f} s in all.</p>
{head}
{pictures}<p>{escape(why_no_figures)}</p>
{"".join(rest)}
<h2>How it was measured</h2><p>{escape(METHOD)}</p>
</main></body></html>
"""


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = "".join(f"<tr{_row_class(row)}>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    titled = f"<h2>{escape(table.title)}</h2>"
    return (
        f'{titled}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}\n'
    )


def _row_class(row) -> str:
    return ' class="best"' if row[0].startswith("ours (") else ""


def _cell(text: str) -> str:
    kind = {"pass": ' class="pass"', "FAIL": ' class="fail"'}.get(text, "")
    return f"<td{kind}>{escape(text)}</td>"


def _figure(name: str, by_theme: dict[str, bytes]) -> str:
    light, dark = (f"data:image/png;base64,{b64encode(by_theme[theme]).decode()}" for theme in ("light", "dark"))
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    caption = escape(CAPTIONS[name])
    image = f'<img src="{light}" alt="{caption}">'
    return f"<figure><picture>{source}{image}</picture><figcaption>{caption}</figcaption></figure>\n"


def _style() -> str:
    variables = {theme: "".join(f"--{k}: {v}; " for k, v in colors.items()) for theme, colors in COLORS.items()}
    return STYLE.format(**variables)
