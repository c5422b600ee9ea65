"""pytest: the whole suite runs in one process a core where pytest-xdist is installed; chosen tests run here, at once.

A process computes on one thread, so that together they take the machine once; a test whose subject is several threads
asks for them (tests/openmythos_kernels does for all of its own).
"""

from __future__ import annotations

import os

import pytest

from tests.triton_on_cpu.plugin import mode_of

MOST = 8  # each process holds PyTorch and whatever its tests compile
_SCOPES = "loadfile"  # xdist's own name for a file at a time; ours below
# Files of few tests that take minutes together: spread over the processes, a test at a time.
_SPREAD = (
    "tests/cuda_on_cpu/test_faults.py",
    "tests/cuda_on_cpu/test_sanitizers.py",
    "tests/outside/test_upstreams_own_tests.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    if hasattr(config, "workerinput"):
        return  # one of the processes itself
    option = config.option
    chosen = (
        config.args_source is not pytest.Config.ArgsSource.TESTPATHS
        or option.keyword
        or option.usepdb
        or option.collectonly
    )
    if (
        chosen or getattr(option, "numprocesses", 0) is not None
    ):  # given on the command line, or there is no pytest-xdist
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    option.numprocesses, option.dist = min(cores, MOST), _SCOPES
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // option.numprocesses)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a team larger than its share sleeps where it would spin


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """In a worker, what takes longest comes first, so that no process is left alone with it at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: 0 if item.nodeid.startswith(_SPREAD) else 1 if mode_of(item) else 2)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.option.dist != _SCOPES:
        return None
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # the order of the collection, see above

    class ByFile(LoadScopeScheduling):
        """A file's tests stay together, as they share what is made once; those of a mode of Triton share a process."""

        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(_SPREAD):
                return nodeid
            file = nodeid.partition("::")[0]
            mode = next((m for m in ("interpreter", "ptxsim") if f"{m}]" in nodeid), "")
            return f"{file} {mode}"

    return ByFile(config, log)
