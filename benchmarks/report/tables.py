"""The tables, shared by the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from benchmarks.contenders import LABELS


class Table(NamedTuple):
    """A table of strings: the first column is text, the others are numbers and align right; `note` is printed below."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def text(self) -> str:
        widths = [max(len(line[i]) for line in [self.header, *self.rows]) for i in range(len(self.header))]

        def line(cells):
            return "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths)))

        rule = "  ".join("-" * w for w in widths)
        parts = [self.title, rule, line(self.header), rule, *(line(row) for row in self.rows), rule]
        return "\n".join(part.rstrip() for part in parts + ([self.note] if self.note else []))


def tables(results: dict) -> list[Table]:
    """All tables that the results allow: the machine first, the requirements last."""
    suites = results["suites"]
    made = [machine_table(results["machine"])]
    if "depth" in suites:
        made += depth_tables(suites["depth"], results["machine"]["device"])
    if "train" in suites:
        made.append(train_table(suites["train"]))
    if "headline" in suites:
        made.append(headline_table(suites["headline"], results["machine"]["device"]))
    if "cache" in suites:
        made.append(cache_table(suites["cache"]))
    if "kernels" in suites:
        made.append(kernels_table(suites["kernels"]))
    if "model" in suites:
        made.append(model_table(suites["model"]))
    if requirements(results):
        made.append(requirement_table(results))
    return made


def requirements(results: dict) -> list[dict]:
    return [row for suite in results["suites"].values() for row in suite["requirements"]]


def requirement_table(results: dict) -> Table:
    rows = []
    for row in requirements(results):
        sign = ">=" if row["higher"] else "<="
        enforced = not (results["quick"] and row["timing"])
        verdict = "pass" if row["passed"] else "FAIL" if enforced else "missed (not enforced)"
        measured = "not measured" if row["measured"] is None else number(row["measured"])
        required = f"{sign} {number(row['required'])}"
        rows.append((row["name"], required, measured, row["unit"], row["detail"], verdict))
    note = "Quick run: rows that depend on the machine's speed are reported, not enforced." if results["quick"] else ""
    return Table("Required and measured", ("", "required", "measured", "", "range", ""), rows, note)


def depth_tables(suite: dict, device: str) -> list[Table]:
    """One table per workload: medians in ms and, in parentheses, the speedup over upstream."""
    made = []
    for workload, title in suite["workloads"].items():
        rows = []
        for name, label in LABELS.items():
            if name in suite["missing"]:
                rows.append((label, *["-"] * len(suite["depths"])))
                continue
            cells = []
            for depth in suite["depths"]:
                cell = f"{1e3 * suite['median'][workload][depth][name]['median']:.1f}"
                ratio = suite["speedup"][workload][depth].get(name)
                cells.append(f"{cell} ({ratio['median']:.2f}x)" if ratio else cell)
            rows.append((label, *cells))
        header = ("loops", *map(str, suite["depths"]))
        caption = f"{title}: median ms on {device}, and speedup over {LABELS['upstream']}"
        missing = "  ".join(f"{LABELS[name]}: {reason}." for name, reason in suite["missing"].items())
        made.append(Table(caption[0].upper() + caption[1:], header, rows, missing))
    return made


def train_table(suite: dict) -> Table:
    curves, apart = suite["losses"], suite["difference"]
    marks = sorted({1, 50, 100, 200, len(apart)} & set(range(1, len(apart) + 1)))
    names = {**LABELS, "control": "reference, weights one ulp apart"}
    rows = [(names[name], *(f"{curve[m - 1]:.6f}" for m in marks)) for name, curve in curves.items()]
    for label, values in (("ours", apart), ("the control", suite["control"])):
        rows.append((f"largest distance of {label} so far", *(f"{max(values[:m]):.1e}" for m in marks)))
    ratio = suite["speedup"]
    note = (
        f"{suite['corpus']}, {suite['batch'][0]} x {suite['batch'][1]} bytes a step, {suite['loops']} loops. "
        f"A step of ours is {ratio['median']:.2f}x as fast ({ratio['low']:.2f} .. {ratio['high']:.2f} over all steps). "
        "Training is chaotic. The control is the reference trained from weights that differ in the last bit: it shows "
        "how far a single rounding error grows. Ours rounds differently in every step."
    )
    return Table("Loss in nats per byte, small model, equal seed and batches", ("step", *map(str, marks)), rows, note)


def headline_table(suite: dict, device: str) -> Table:
    parts = {f"decode, {cached} cached": part for cached, part in suite["decode"].items()}
    parts["training step"] = suite["train"]
    rows = []
    for name in ("upstream", "reference", "ours"):
        if name in suite["missing"]:
            rows.append((LABELS[name], *["-"] * len(parts)))
        else:
            rows.append((LABELS[name], *(f"{1e3 * median(part['seconds'][name]):.1f}" for part in parts.values())))
    for label, key in (("upstream", "speedup"), ("reference", "speedup_over_reference")):
        ratios = [part[key] for part in parts.values()]
        rows.append((f"ours over {LABELS[label]}", *(f"{r['median']:.2f}x" if r else "-" for r in ratios)))
    missing = "  ".join(f"{LABELS[name]}: {reason}." for name, reason in suite["missing"].items())
    return Table(f"Headline model: median ms on {device}", ("", *parts), rows, missing)


def cache_table(suite: dict) -> Table:
    rows = []
    for name, row in suite["rows"].items():
        upstream = "not installed" if row["upstream"] is None else f"{row['upstream']:.0f}"
        share = f"1/{row['full'] / row['ours']:.1f}"
        rows.append((name, f"{row['full']:.0f}", upstream, f"{row['ours']:.0f}", share))
    header = ("", "full K/V", LABELS["upstream"], "ours", "ours of full")
    note = f"{suite['dtype']}; measured on a cache that holds {suite['tokens']} tokens."
    return Table("KV cache, bytes per token, layer and loop", header, rows, note)


def kernels_table(suite: dict) -> Table:
    if not suite["rows"]:
        return Table("Kernels on a GPU", ("", ""), [(suite["missing"], "")])
    names = ("upstream", "pytorch", "ours", "pytorch, graph", "ours, graph", "cuda, graph", "triton, graph")
    rows = []
    for row in suite["rows"]:
        times = {name: row["medians"].get(name) for name in names}
        shown = (f"{1e3 * t:.3f}" if t else "-" for t in times.values())
        ratios = []
        for slow, fast in (("upstream", "ours"), ("pytorch", "ours"), ("pytorch, graph", "ours, graph")):
            ratios.append(f"{times[slow] / times[fast]:.2f}x" if times[slow] and times[fast] else "-")
        rows.append((row["name"], *shown, *ratios, f"{100 * row['share']:.0f} % of {row['bound_is']}"))
    header = (
        "",
        LABELS["upstream"],
        *names[1:],
        f"over {LABELS['upstream']}",
        "over pytorch",
        "as graphs",
        "share of bound",
    )
    note = (
        f"{suite['dtype']}; measured bounds: copy {suite['copy_gb_per_s']:.0f} GB/s, "
        f"GEMM {suite['tflop_per_s']:.0f} TFLOP/s. "
        "pytorch: torch.compile, scaled_dot_product_attention, grouped_mm. graph: replayed as a CUDA graph."
    )
    return Table("Kernels on a GPU, mythos_1b's sizes, median ms", header, rows, note)


def model_table(suite: dict) -> Table:
    if not suite["rows"]:
        return Table("A whole model on a GPU", ("", ""), [(suite["missing"], "")])
    rows = []
    for row in suite["rows"]:
        for i, (who, seconds) in enumerate(row["medians"].items()):
            ratio = row["over"].get(who)
            shown = f"{ratio['median']:.2f}x ({ratio['low']:.2f} .. {ratio['high']:.2f})" if ratio else "-"
            name, _, how = who.partition(", ")
            label = f"{LABELS[name]}, {how}"
            rows.append(
                (
                    row["name"] if i == 0 else "",
                    label,
                    f"{1e3 * seconds:.1f}",
                    shown,
                    f"{row['memory'][who] / 2**30:.2f}",
                )
            )
    note = f"{suite['loops']} loops, no position halts. GiB: peak memory beyond weights and cache." + "".join(
        f" {LABELS[name]}: {reason}." for name, reason in suite["missing"].items()
    )
    return Table(
        "mythos_1b on a GPU, calls from Python", ("", "", "median ms", "faster than the first", "GiB"), rows, note
    )


def machine_table(machine: dict) -> Table:
    rows = [
        ("device", f"{machine['device']}: {machine['device_name']}"),
        (
            "processor",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['vectors']}",
        ),
        (
            "measured",
            f"copy {machine['copy_gb_per_s']:.1f} GB/s, GEMM {machine['gemm_gflop_per_s']:.0f} GFLOP/s (fp32)",
        ),
        ("versions", f"torch {machine['torch']}, open-mythos {machine['open-mythos']}, Python {machine['python']}"),
        ("commit", machine["commit"]),
    ]
    return Table("Machine", ("", ""), rows)


def number(x: float) -> str:
    return f"{x:.1e}" if 0 < abs(x) < 0.01 else f"{x:.4g}"
