"""`python -m tests.kit.nvcc`: what nvcc makes of csrc/cuda/*.cu for each architecture, with registers and spills.

A static check: nothing is run. Exits with 1 when a file does not compile or a kernel spills registers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
FLAGS = ("-O3", "-std=c++17", "-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__",
         "-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__")  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel on one architecture; bytes but for registers."""

    file: str
    name: str
    architecture: str
    registers: int
    spilled: int
    shared: int


def compiler() -> Optional[str]:
    return shutil.which("nvcc")


def compile_kernels(source: Path, architecture: str) -> list[Kernel]:
    """Raises RuntimeError with nvcc's words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler(), *FLAGS, f"-arch={architecture}", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-c", str(source)]
        run = subprocess.run([*command, "-o", f"{folder}/out.o"], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"nvcc cannot compile {source.name} for {architecture}:\n{run.stderr[-4000:]}")
    blocks = re.split(r"Compiling entry function '", _demangled(run.stderr))[1:]
    return [_parse(block, source, architecture) for block in blocks]


def _parse(block: str, source: Path, architecture: str) -> Kernel:
    number = lambda pattern: sum(int(n) for n in re.findall(pattern, block))  # noqa: E731
    name = re.match(r"(?:void )?(?:\w+::|\(anonymous namespace\)::)*([^(]*)", block)[1]
    return Kernel(source.name, name, architecture, number(r"Used (\d+) registers"),
                  number(r"(\d+) bytes spill"), number(r"(\d+) bytes smem"))  # fmt: skip


def _demangled(text: str) -> str:
    if shutil.which("c++filt") is None:
        return text
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def table(sources: Sequence[Path] = SOURCES, architectures: Sequence[str] = ARCHITECTURES, jobs: int = 2) -> list[Kernel]:
    work = [(source, architecture) for source in sources for architecture in architectures]
    with ThreadPoolExecutor(jobs) as pool:
        return [kernel for kernels in pool.map(lambda item: compile_kernels(*item), work) for kernel in kernels]


def main(arguments: Sequence[str]) -> int:
    if compiler() is None:
        print("nvcc is not installed: the CUDA sources were not compiled")
        return 0
    wanted = [source for source in SOURCES if not arguments or source.name in arguments]
    kernels = table(wanted)
    width = max(len(k.name) for k in kernels)
    print(f"{'kernel'.ljust(width)}  arch    registers  spilled  shared   (static, by ptxas)")
    for k in kernels:
        print(f"{k.name.ljust(width)}  {k.architecture:6}  {k.registers:9}  {k.spilled:7}  {k.shared:6}")
    spilling = sorted({k.name for k in kernels if k.spilled})
    if spilling:
        print(f"{len(spilling)} kernels spill registers: {', '.join(spilling)}", file=sys.stderr)
    return bool(spilling)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
