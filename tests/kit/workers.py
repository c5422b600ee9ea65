"""pytest: with pytest-xdist, the whole suite runs in one process per core; chosen tests run in this process.

Each process computes with one thread, so that together they use every core once. Tests about several threads set the
number of threads, as all tests in tests/openmythos_kernels do.
"""

from __future__ import annotations

import os

import pytest

from tests.triton_on_cpu.plugin import mode_of

MOST = 8  # processes; each needs memory for PyTorch and for what its tests compile
_SCOPES = "loadfile"  # xdist's name for its scheduler by file, which ours below replaces
# Files whose few tests take minutes together; their tests are distributed one by one.
_SPREAD = (
    "tests/cuda_on_cpu/test_faults.py",
    "tests/cuda_on_cpu/test_sanitizers.py",
    "tests/outside/test_upstreams_own_tests.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    if hasattr(config, "workerinput"):
        return  # a worker
    option = config.option
    chosen = (
        config.args_source is not pytest.Config.ArgsSource.TESTPATHS
        or option.keyword
        or option.usepdb
        or option.collectonly
    )
    given = getattr(option, "numprocesses", 0) is not None  # on the command line, or there is no pytest-xdist
    if chosen or given:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    option.numprocesses, option.dist = min(cores, MOST), _SCOPES
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // option.numprocesses)))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """In a worker, the longest tests come first, so that none of them starts when other workers are done."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: 0 if item.nodeid.startswith(_SPREAD) else 1 if mode_of(item) else 2)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.option.dist != _SCOPES:
        return None
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # keep the order of pytest_collection_modifyitems

    class ByFile(LoadScopeScheduling):
        """Keeps tests together that share fixtures (those of a file) or a process (those of a file and mode)."""

        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(_SPREAD):
                return nodeid
            file = nodeid.partition("::")[0]
            mode = next((m for m in ("interpreter", "ptxsim") if f"{m}]" in nodeid), "")
            return f"{file} {mode}"

    return ByFile(config, log)
