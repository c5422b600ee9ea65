"""A table of compiled kernels: written, read, compared.

A table (by default `docs/compile.csv`) has a row per kernel, configuration, dtype and target. A row's `key` is a hash
of the kernel's source and all that it calls, of argument types, constants and options: a changed kernel has new keys.
"""

from __future__ import annotations

import csv
import functools
import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from pathlib import Path

import triton
from tqdm import tqdm

from openmythos_kernels.runtime.target import TARGETS
from openmythos_kernels.verify.ahead.build import build
from openmythos_kernels.verify.ahead.record import Launch, launches
from openmythos_kernels.verify.specification import DTYPES
from openmythos_kernels.verify.specs import specifications

# Products that read shared memory on their own. Triton 3.6 compiled some loops of them, with one stage, to accesses
# outside the block's shared memory (compute-sanitizer on an H200). All our kernels that multiply do so in a loop.
ASYNCHRONOUS = ("wgmma", "tcgen05.mma")


@dataclass(frozen=True)
class Row:
    """Static figures; see `openmythos_kernels.verify.ahead.build.Built`."""

    op: str
    kernel: str
    dtype: str
    target: str
    sizes: str  # the first of the op's shipped sizes that launches this
    configuration: str
    registers: int
    spilled: int
    shared: int
    warps: int
    occupancy: float
    instruction: str
    seconds: float  # 0 where the compiler's cache had the kernel
    triton: str
    key: str

    def faults(self, before: Row | None = None) -> list[str]:
        """The figures that break a budget or are worse than in `before`, the row of the same place."""
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > TARGETS[self.target].shared_memory:
            found.append(f"{self.shared} bytes of shared memory, the target has {TARGETS[self.target].shared_memory}")
        if self.instruction == "missing":
            found.append("multiplies matrices without a matrix instruction")
        if self.instruction in ASYNCHRONOUS and "num_stages=1" in self.configuration.split():
            found.append(f"{self.instruction} in a loop of one stage")
        if before and before.triton == self.triton and self.occupancy < before.occupancy:
            found.append(f"occupancy {self.occupancy:.2f}, was {before.occupancy:.2f}")
        return [f"{self.kernel} {self.dtype} {self.target} [{self.configuration}]: {fault}" for fault in found]

    @property
    def place(self) -> tuple:
        return self.op, self.kernel, self.dtype, self.target, self.sizes, self.configuration


@dataclass(frozen=True)
class Job:
    """One kernel to compile, in plain values, as other processes compile it."""

    op: str
    dtype: str
    target: str
    sizes: str
    index: int  # among the launches of these sizes

    def launch(self) -> Launch:
        return _launches(self.op, self.sizes, self.dtype, self.target)[self.index]


@functools.lru_cache(maxsize=64)
def _launches(op: str, sizes: str, dtype: str, target: str) -> list[Launch]:
    specification = next(d for d in specifications() if d.name == op)
    return launches(specification, specification.shipped[sizes], DTYPES[dtype], TARGETS[target])


def key(launch: Launch, target: str) -> str:
    options = sorted(launch.options.items())
    text = f"{launch.kernel.cache_key} {launch.signature} {launch.constants} {launch.hints} {options} {target}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def jobs(
    targets: Sequence[str], dtypes: Sequence[str], only: Sequence[str] = (), variants: str = ""
) -> tuple[dict[str, Job], list[str]]:
    """The distinct kernels, by key, of the shipped sizes whose name contains `variants`; and the sizes that ops
    refuse."""
    found: dict[str, Job] = {}
    refused: list[str] = []
    for specification in specifications():
        if "triton" not in specification.backends or (only and not any(specification.name.startswith(o) for o in only)):
            continue
        for target in targets:
            for dtype in dtypes:
                for sizes in specification.shipped:
                    if variants not in sizes or DTYPES[dtype] not in specification.dtypes:
                        continue
                    try:
                        launched = _launches(specification.name, sizes, dtype, target)
                    except ValueError as error:  # the op refuses these sizes
                        refused.append(f"{specification.name}, {sizes}, {dtype}, {target}: {error}")
                        continue
                    for i, launch in enumerate(launched):
                        found.setdefault(key(launch, target), Job(specification.name, dtype, target, sizes, i))
    return found, refused


def compile_job(job: Job) -> Row:
    launch = job.launch()
    built = build(launch, TARGETS[job.target])
    return Row(
        job.op,
        launch.name,
        job.dtype,
        job.target,
        job.sizes,
        launch.configuration(),
        built.registers,
        built.spilled,
        built.shared,
        built.warps,
        round(built.occupancy, 3),
        built.instruction,
        round(built.seconds, 1),
        triton.__version__,
        key(launch, job.target),
    )


def compile_all(wanted: Iterable[Job], processes: int = 2) -> list[Row]:
    """Rows in the order of the jobs."""
    wanted = list(wanted)
    rows: dict[Job, Row] = {}
    with ProcessPoolExecutor(processes) as pool, tqdm(total=len(wanted), unit="kernel", leave=False) as progress:
        running = {pool.submit(compile_job, job): job for job in wanted}
        for done in as_completed(running):
            rows[running[done]] = done.result()
            progress.update()
    return [rows[job] for job in wanted]


def read(path: Path) -> list[Row]:
    with open(path, newline="") as file:
        kinds = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Row)}
        return [Row(**{name: kinds[name](value) for name, value in line.items()}) for line in csv.DictReader(file)]


def merged(kept: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The table `kept` with `rows` in their places.

    Rows that these sizes no longer launch, as another configuration was chosen, are removed. A row keeps its compile
    time if the compiler's cache had the kernel this time.
    """
    taken = {(row.place, row.key): row.seconds for row in kept}
    rows = [replace(row, seconds=row.seconds or taken.get((row.place, row.key), 0.0)) for row in rows]
    compiled = {(row.op, row.dtype, row.target, row.sizes) for row in rows}
    return [row for row in kept if (row.op, row.dtype, row.target, row.sizes) not in compiled] + rows


def write(rows: Iterable[Row], path: Path) -> None:
    names = [f.name for f in fields(Row)]
    with open(path, "w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(names)
        lines.writerows([getattr(row, name) for name in names] for row in sorted(rows, key=lambda row: row.place))


def summary(rows: Sequence[Row]) -> str:
    """One line per kernel and target, with the worst of its rows."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.target), []).append(row)
    lines = [("kernel", "target", "rows", "registers", "spilled", "shared", "occupancy", "matrix instruction")]
    for (kernel, target), found in sorted(groups.items()):
        lines.append(
            (
                kernel,
                target,
                str(len(found)),
                str(max(r.registers for r in found)),
                str(max(r.spilled for r in found)),
                str(max(r.shared for r in found)),
                f"{min(r.occupancy for r in found):.2f}",
                ", ".join(sorted({r.instruction for r in found if r.instruction})),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)
