"""`python -m openmythos_kernels verify`: the error of every op on this device beside that of eager PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from openmythos_kernels.runtime.backends import choose
from openmythos_kernels.verify.check import attempt, errors, judge
from openmythos_kernels.verify.specification import DTYPES, Specification
from openmythos_kernels.verify.specs import specifications


@dataclass
class Row:
    """All cases of one op in one dtype. Errors are relative, in Frobenius norm, against float64."""

    op: str
    dtype: str
    backend: str
    cases: int = 0
    error: float = 0.0  # the largest over outputs, gradients and cases
    eager: float = 0.0  # eager PyTorch's in the same tensor
    failures: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        if not self.cases:
            return "not run"
        return "FAIL" if self.failures else "pass"


def main(device: str = "auto", only: Sequence[str] | None = None, dtypes: Sequence[str] = tuple(DTYPES)) -> int:
    """Prints the table. Returns 0 if every row passes, 1 if one fails, 2 for wrong arguments."""
    unknown = [name for name in dtypes if name not in DTYPES]
    chosen = [d for d in specifications() if not only or any(d.name.startswith(prefix) for prefix in only)]
    if unknown or not chosen:
        asked = (
            f"--dtypes: got {','.join(unknown)}, must be of {','.join(DTYPES)}" if unknown else f"--only: no op {only}"
        )
        print(f"verify: {asked}", file=sys.stderr)
        return 2
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        print("verify: --device cuda: torch finds no GPU", file=sys.stderr)
        return 2
    where = torch.device("cuda" if cuda else "cpu")
    wanted = [(d, name) for d in chosen for name in dtypes if DTYPES[name] in d.dtypes]
    with tqdm(total=sum(len(d.cases) for d, _ in wanted), unit="case", leave=False) as progress:
        rows = [verify(d, name, where, lambda: progress.update()) for d, name in wanted]
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}")
    print(render(rows))
    return int(any(row.failures for row in rows))


def verify(
    specification: Specification, dtype: str, device: torch.device, tick: Callable[[], object] = lambda: None
) -> Row:
    """Runs all cases of one op. A case that raises fails; the others still run."""
    choice = choose(specification.name, device.type)
    row = Row(specification.name, dtype, choice.backend + (f" ({choice.reason})" if choice.reason else ""))
    for case, sizes in specification.cases.items():
        if choice.fast:
            try:
                found, drawn = attempt(specification, sizes, DTYPES[dtype], device)
                for error, eager in errors(specification, found, drawn).values():
                    if not error <= row.error:  # True for nan, too
                        row.error, row.eager = error, eager
                judge(specification, DTYPES[dtype], found, drawn)
            except Exception as error:  # the table is printed in any case
                row.failures += (f"{case}: {type(error).__name__}: {error}",)
            row.cases += 1
        tick()
    return row


def render(rows: Iterable[Row]) -> str:
    """The table as text, followed by all failures in full."""
    rows = list(rows)
    lines = [("op", "dtype", "cases", "error", "eager's", "verdict", "backend")]
    for row in rows:
        shown = (f"{row.error:.1e}", f"{row.eager:.1e}") if row.cases else ("-", "-")
        lines.append((row.op, row.dtype, str(row.cases), *shown, row.verdict, row.backend))
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    text += [f"{row.op} {row.dtype}, {failure}" for row in rows for failure in row.failures]
    failed = sum(bool(row.failures) for row in rows)
    text.append(
        f"{failed} of {len(rows)} rows fail" if failed else "within the error budget: 2 x eager PyTorch's error + 2 ulp"
    )
    return "\n".join(text)
