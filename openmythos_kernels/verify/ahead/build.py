"""Compiles one recorded launch for one target and reads what its machine code needs."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from openmythos_kernels.runtime.target import Target
from openmythos_kernels.verify.ahead.record import Launch

_REGISTER_STEP = {32: (8, 255), 64: (8, 512)}  # warp size -> allocation unit and most registers of one thread
_MATRIX = ("wgmma", "tcgen05.mma", "mma.sync", "v_mfma")


@dataclass(frozen=True)
class Built:
    """Static figures of one compiled kernel; none of them measures speed.

    Attributes:
        registers: of one thread. spilled: bytes that one thread keeps in local memory for lack of registers.
        shared: bytes of one block. occupancy: warps of this kernel that fit a multiprocessor, as a share of its limit.
        instruction: the matrix instruction found, "" if none is needed, or "missing".
        seconds: compile time.
    """

    registers: int
    spilled: int
    shared: int
    warps: int
    occupancy: float
    instruction: str
    seconds: float


def build(launch: Launch, target: Target) -> Built:
    """Compiles with Triton's own tools, without a GPU or driver.

    Raises:
        Exception: Triton cannot compile the kernel for this target.
    """
    began = time.monotonic()
    compiled = triton.compile(launch.source(), target=gpu_target(target), options=launch.options)
    seconds = time.monotonic() - began
    if target.warp == 64:
        code = compiled.asm["amdgcn"]
        # Scalars spill into lanes of vector registers; what goes to memory is the private segment.
        registers, spilled = _field(code, "vgpr_count"), _field(code, "private_segment_fixed_size")
    else:
        code = compiled.asm["ptx"]
        registers, spilled = _resources(compiled.asm["cubin"])
    found = [name for name in _MATRIX if name in code] or [
        "missing" if _multiplies(compiled.asm["ttir"], target) else ""
    ]
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return Built(registers, spilled, shared, warps, occupancy(target, registers, shared, warps), found[0], seconds)


def _multiplies(ttir: str, target: Target) -> bool:
    """True if a matrix product needs a matrix instruction; NVIDIA has none for float32 in full precision."""
    products = [line for line in ttir.splitlines() if "tt.dot" in line]
    full = [line for line in products if re.search(r"xf32> \* ", line) and "tf32" not in line]
    return bool(products) and (target.warp == 64 or len(full) < len(products))


def gpu_target(target: Target) -> GPUTarget:
    if target.warp == 64:
        return GPUTarget("hip", target.name, 64)
    return GPUTarget("cuda", int(target.name.removeprefix("sm_")), 32)


def occupancy(target: Target, registers: int, shared: int, warps: int) -> float:
    """Theoretical occupancy, from the limits of registers, shared memory, warps and blocks; 0 if no block fits."""
    step, most = _REGISTER_STEP[target.warp]
    if registers > most or shared > target.shared_memory:
        return 0.0
    per_warp = -(-max(registers, 1) // step) * step * target.warp
    limits = [target.registers_per_unit // (per_warp * warps), target.warps_per_unit // warps, target.blocks_per_unit]
    if shared:
        limits.append(target.shared_memory_per_unit // shared)
    return min(limits) * warps / target.warps_per_unit


def _field(code: str, name: str) -> int:
    found: Any = re.search(rf"\.{name}:\s*(\d+)", code)
    return int(found[1])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes according to cuobjdump; a stack frame counts as spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        out = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True)
    used: Any = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", out.stdout + out.stderr)
    return int(used[1]), int(used[2]) + int(used[3])
