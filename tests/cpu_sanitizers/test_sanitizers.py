"""The op suite on the C++ extension, built with AddressSanitizer + UBSan, and with ThreadSanitizer on four threads.

Takes minutes, since each mode compiles the extension: `python -m pytest tests/cpu_sanitizers -m slow`.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kit import cpp_build, other_processors

SLOW = pytest.mark.slow

# Every op with CPU kernels in every case of its specification, and what only modules call.
SUITE = (
    "tests/openmythos_kernels/ops/test_specifications.py",
    "tests/openmythos_kernels/ops/moe/test_repeated.py",
    "tests/openmythos_kernels/nn/paths/test_decode_loop.py",
    "tests/openmythos_kernels/nn/paths/test_prefill_block.py",
    "tests/openmythos_kernels/nn/paths/test_moe_inference.py",
    "tests/openmythos_kernels/ops/moe/test_experts.py::test_views_that_begin_at_an_odd_number",
    "tests/openmythos_kernels/ops/mla/test_is_causal.py",
    "tests/openmythos_kernels/ops/mla/test_linear.py::test_products",
    "tests/openmythos_kernels/runtime/test_allocator.py::TestWeightGradients::test_each_is_its_own",
    "tests/openmythos_kernels/runtime/test_allocator.py::TestWeightGradients::test_one_outlives_the_others",
)
OPTIONS = {
    # No leak detection: Python and PyTorch keep memory until they exit.
    "asan": {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"},
    # PyTorch is not instrumented; only the extension's own accesses are checked. A thread-local block whose address is
    # 16 above a page's first byte counts as one of glibc 2.19's: the runtime takes the bytes before it for its size,
    # and ends when they name more memory than there is. Without the interception it reads none.
    "tsan": {
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66:intercept_tls_get_addr=0",
        "OMP_NUM_THREADS": "4",
    },
}
# ThreadSanitizer's shadow memory has a fixed address, which a randomized address space may occupy.
FIXED_PLACES = ["setarch", "-R"]


@pytest.fixture(params=OPTIONS)
def mode(request):
    if reason := cpp_build.missing(request.param):
        pytest.skip(reason)
    if request.param == "tsan" and subprocess.run([*FIXED_PLACES, "true"], capture_output=True).returncode:
        pytest.skip("this system cannot turn off address space randomization (setarch -R)")
    return request.param


def run(mode, folder, *arguments, **settings):
    preloaded = {"LD_PRELOAD": " ".join(cpp_build.libraries(mode)), "PYTHONMALLOC": "malloc"}
    environment = os.environ | OPTIONS[mode] | preloaded | settings
    # No capture (-s): a report ends the process at once.
    prefix = FIXED_PLACES if mode == "tsan" else []
    command = [
        *prefix,
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-s",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        *arguments,
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)


# What CI has time for: the kernels of the two 16-bit types are the same templates, and threads divide the work of all
# types alike. Each slice also stands for a processor that CI's may not be, as a compilation takes longer than a slice.
_SHORT = "not -float16- and not random_sizes and not layouts and not other_python_threads"
SLICES = {"asan": ("avx2", _SHORT), "tsan": ("default", f"{_SHORT} and (budget or not float16)")}


@SLOW
def test_a_slice_of_the_op_suite_is_clean(mode):
    processor, chosen = SLICES[mode]
    folder = other_processors.tree(processor, mode)
    succeeds(run(mode, folder, *SUITE, "-k", chosen, **other_processors.SETTINGS[processor]))


@SLOW
def test_the_op_suite_is_clean(mode):
    succeeds(run(mode, cpp_build.tree(mode), *SUITE))


def succeeds(done):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@dataclass(frozen=True)
class Fault:
    mode: str
    file: str  # relative to csrc/cpu
    old: str
    new: str
    tests: str  # pytest's -k
    report: str  # part of the sanitizer's report


FAULTS = {
    "the copy of a row is an element short": Fault(
        "asan",
        "norm/rms_norm.cpp",
        "std::vector<A> s(D);",
        "std::vector<A> s(D - 1);",
        "rms_norm and budget",
        "ERROR: AddressSanitizer",
    ),
    "scratch is a row short": Fault(
        "asan",
        "moe/gemv.cpp",
        "scratch.size(), 2 * job.tokens * kRows)",
        "scratch.size(), (2 * job.tokens - 1) * kRows)",
        "moe_experts and budget",
        "ERROR: AddressSanitizer",
    ),
    "lanes of two bf16 are read misaligned": Fault(
        "asan",
        "moe/bf16_dot.cpp",
        "w.scalar_type() != at::kBFloat16 || !is_aligned(w)",
        "w.scalar_type() != at::kBFloat16",
        "odd_number",
        "misaligned address",
    ),
    "a mask is read past its end": Fault(
        "asan", "mla/causal.cpp", "stride, S - seen)", "stride, S - seen + 1)", "causal", "ERROR: AddressSanitizer"
    ),
    "shifts by more bits than there are": Fault(
        "asan",
        "moe/route.cpp",
        "std::vector<A> weight(k);",
        "std::vector<A> weight(k + (1 << (32 + k)) * 0);",
        "moe_route and budget",
        "runtime error: shift exponent",
    ),
    "all threads count into one row": Fault(
        "tsan",
        "moe/route.cpp",
        "const int64_t thread = threads > 1 ? at::get_thread_num() : 0;",
        "const int64_t thread = 0;",
        "moe_route and budget",
        "ThreadSanitizer: data race",
    ),
    "a phase does not wait for the previous one": Fault(
        "tsan",
        "mla/decode.cpp",
        "project_down(team, s, buf);\n    team.barrier();",
        "project_down(team, s, buf);",
        "mla_decode and budget",
        "ThreadSanitizer: data race",
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_can_be_seeded(fault):
    assert (Path(__file__).parents[2] / "csrc/cpu" / fault.file).read_text().count(fault.old) == 1


@SLOW
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_seeded_faults_are_reported(fault):
    if reason := cpp_build.missing(fault.mode):
        pytest.skip(reason)

    def edit(name, text):
        if name != fault.file:
            return text
        assert text.count(fault.old) == 1
        return text.replace(fault.old, fault.new)

    done = run(fault.mode, cpp_build.tree(fault.mode, edit), *SUITE, "-k", fault.tests)
    assert done.returncode and fault.report in done.stdout + done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
