"""The harness finds faults. Each replaces one text in a kernel and runs in a process of its own."""

import os
import subprocess
import sys

import pytest

from tests.cuda_on_cpu import build, harness

pytestmark = pytest.mark.skipif(bool(harness.missing()), reason=harness.missing())

FORWARD, REVERSE, RANDOM = range(3)


def environment(mode: str) -> dict:
    """The environment of a process that loads kernels built in this mode."""
    made = {**os.environ, "CUDA_ON_CPU_MODE": mode, "OMP_NUM_THREADS": "1"}
    if mode != "plain":
        made["LD_PRELOAD"] = build.sanitizer_library(mode)
        made["ASAN_OPTIONS"] = "detect_leaks=0 exitcode=66"
        made["UBSAN_OPTIONS"] = "exitcode=66"
        made["TSAN_OPTIONS"] = "exitcode=66 ignore_noninstrumented_modules=1"
    return made


def run(job, mode, order, *fault):
    command = [sys.executable, "-m", "tests.cuda_on_cpu.faulty", job, mode, str(order), *fault]
    return subprocess.run(command, cwd=build.ROOT, env=environment(mode), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("order", [FORWARD, REVERSE, RANDOM])
@pytest.mark.parametrize("mode", build.MODES)
def test_sound_kernels_pass(mode, order):
    done = run("samples", mode, order)
    assert done.returncode == 0, done.stderr


SAMPLE_FAULTS = {
    "a missing barrier": ("tsan", FORWARD, "  __syncthreads();\n  out[", "  out[", "data race"),
    "a missing barrier, by poison": ("plain", FORWARD, "  __syncthreads();\n  out[", "  out[", ""),
    "a non-atomic update": ("tsan", FORWARD, "atomicAdd(&counts[values[i]], 1)", "counts[values[i]] += 1", "data race"),
    "uninitialized shared memory": ("plain", FORWARD, "counts[i] = 0;", ";", ""),
    "a shared array one too small": ("asan", FORWARD, "part[Threads];", "part[Threads - 1];", "out of bounds"),
    "an element out of bounds": ("asan", FORWARD, "i < n; i +=", "i <= n; i +=", "heap-buffer-overflow"),
    "barrier divergence": (
        "plain",
        FORWARD,
        "  __syncthreads();\n  out[",
        "  if (threadIdx.x < 32) __syncthreads();\n  else __syncthreads();\n  out[",
        "barrier divergence",
    ),
    "lanes missing from a shuffle": (
        "plain",
        FORWARD,
        "int sum = x[threadIdx.x];",
        "int sum = x[threadIdx.x];\n  if (threadIdx.x == 5) __syncthreads();",
        "deadlock",
    ),
    "lanes at different shuffles": (
        "plain",
        FORWARD,
        "int sum = x[threadIdx.x];",
        "int sum = x[threadIdx.x];\n  if (threadIdx.x == 5) __shfl_sync(0xffffffffu, sum, 0);",
        "warp divergence",
    ),
}


@pytest.mark.parametrize("fault", SAMPLE_FAULTS)
def test_finds_a_fault_in_a_sample(fault):
    mode, order, old, new, said = SAMPLE_FAULTS[fault]
    done = run("samples", mode, order, "samples.cu", old, new)
    assert done.returncode not in (0, 1), done.stderr
    assert said in done.stderr


OUR_FAULTS = {
    "a missing barrier": (
        "tsan",
        "loop_step.cu",
        "    team_sync();\n    if (lane < R)",
        "    if (lane < R)",
        "data race",
    ),
    "scalars read too early": ("tsan", "loop_step.cu", "    team_sync();  // also", "    // also", "data race"),
    "a row out of bounds": (
        "asan",
        "loop_step.cu",
        "first + r < N ? first + r : N - 1",
        "first + r",
        "buffer-overflow",
    ),
    "a shared array one too small": (
        "asan",
        "compaction.cu",
        "warp_sums[kWarps];",
        "warp_sums[kWarps - 1];",
        "out of bounds",
    ),
    "a position out of bounds": (
        "asan",
        "compaction.cu",
        "i < positions && running[i], total",
        "running[i], total",
        "buffer-overflow",
    ),
    "vectors where rows are misaligned": ("asan", "loop_step.cu", "shape.D % kWidth<T> == 0 &&", "", "misaligned"),
    "sums read before all warps wrote them": (
        "plain",
        "loop_step_backward.cu",
        "    team_sync();\n    if (lane < rows)",
        "    if (lane < rows)",
        "",
    ),
}


# Each compiles a kernel, which takes up to a minute under a sanitizer.

QUICK = ("sums read before all warps wrote them",)


@pytest.mark.parametrize("fault", [pytest.param(f, marks=[pytest.mark.slow] * (f not in QUICK)) for f in OUR_FAULTS])
def test_finds_a_fault_in_our_kernels(fault):
    mode, file, old, new, said = OUR_FAULTS[fault]
    done = run("ours", mode, FORWARD, file, old, new)
    assert done.returncode not in (0, 1), done.stderr
    assert said in done.stderr
