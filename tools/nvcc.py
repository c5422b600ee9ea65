"""`python -m tools.nvcc`: compiles csrc/cuda/*.cu for each architecture and prints every kernel's registers and spills.

A static check that runs no kernel. The exit status is 1 if a file does not compile, a kernel spills registers, or a
kernel that moves rows has no 16-byte access.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
)


# One access of 16 bytes, as PTX writes it.
_WIDE = re.compile(r"(?:ld|st)\.global\.(?:\w+\.)*(?:v4\.\w32|v2\.\w64)")
# Kernels that move rows of an (N, D) tensor. They must use 16-byte accesses, but for those of any width (`bool`).
MOVES_ROWS = re.compile(r"loop_step_kernel(?!.*\bbool\b)|rows_kernel|long_|(?:gather|scatter)_kernel<uint4>")


@dataclass(frozen=True)
class Kernel:
    """What nvcc reports for one kernel on one architecture.

    Attributes:
        registers: per thread.
        spilled, shared: bytes of spills and of shared memory.
        wide: number of 16-byte global accesses in the PTX.
    """

    file: str
    name: str
    architecture: str
    registers: int
    spilled: int
    shared: int
    wide: int

    @property
    def wrong(self) -> str:
        if self.spilled:
            return "spills registers"
        return "moves rows without 16-byte accesses" if MOVES_ROWS.match(self.name) and not self.wide else ""


def compiler() -> str | None:
    return shutil.which("nvcc")


def compile_kernels(source: Path, architecture: str) -> list[Kernel]:
    """The kernels of one file; raises RuntimeError with nvcc's message if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            compiler(),
            *FLAGS,
            f"-arch={architecture}",
            f"-I{ROOT / 'csrc'}",
            "-Xptxas",
            "-v",
            "-c",
            str(source),
        ]
        command += ["--keep", "--keep-dir", folder, "-o", f"{folder}/out.o"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"nvcc cannot compile {source.name} for {architecture}:\n{run.stderr[-4000:]}")
        ptx = next(Path(folder).glob("*.ptx")).read_text()
    wide = {body.split("(")[0].strip(): len(_WIDE.findall(body)) for body in ptx.split(".entry ")[1:]}
    blocks = re.split(r"Compiling entry function '", run.stderr)[1:]
    return [parse(block, source.name, architecture, wide) for block in blocks]


def parse(block: str, file: str, architecture: str, wide: Mapping[str, int]) -> Kernel:
    """One kernel from ptxas' output for it, which begins with the mangled name."""

    def number(pattern: str) -> int:
        return sum(int(n) for n in re.findall(pattern, block))

    mangled = block.split("'")[0]
    name = re.match(r"(?:void )?(?:\w+::|\(anonymous namespace\)::)*([^(]*)", _demangled(mangled))[1]
    return Kernel(
        file,
        name,
        architecture,
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill"),
        number(r"(\d+) bytes smem"),
        wide.get(mangled, 0),
    )


def _demangled(name: str) -> str:
    if shutil.which("c++filt") is None:
        return name
    return subprocess.run(["c++filt"], input=name, capture_output=True, text=True, check=True).stdout.strip()


def table(
    sources: Sequence[Path] = SOURCES, architectures: Sequence[str] = ARCHITECTURES, jobs: int = 2
) -> list[Kernel]:
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
    print(f"{'kernel'.ljust(width)}  arch    registers  spilled  shared  16-byte accesses   (static, by nvcc)")
    for k in kernels:
        print(f"{k.name.ljust(width)}  {k.architecture:6}  {k.registers:9}  {k.spilled:7}  {k.shared:6}  {k.wide:16}")
    wrong = [k for k in kernels if k.wrong]
    for k in wrong:
        print(f"{k.name} on {k.architecture} {k.wrong}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
