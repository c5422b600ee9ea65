"""pytest: runs tests that have a parameter `triton_mode` in a process of that mode, and reports them as its own.

One process runs all selected tests of a file and mode. If the process dies, or a test exceeds its time, that test
fails, and another process runs the remaining tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.triton_on_cpu import modes

_REPORTS = "TRITON_ON_CPU_REPORTS"  # names the file to which a process in a mode writes its reports, one per line
_reports = pytest.StashKey[dict]()
LIMIT = 240  # seconds for one test, including the start of its process


def pytest_addoption(parser):
    parser.addoption("--ptxsim", type=Path, help="folder of ptxsim; default: ../shared/tools/ptxsim")


def ptxsim(config) -> Path:
    return config.getoption("--ptxsim") or config.rootpath.parent / "shared" / "tools" / "ptxsim"


def mode_of(item) -> str:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("triton_mode", "") if callspec else ""


# ---- in the process that runs everything else ----


def pytest_runtest_protocol(item, nextitem):
    mode = mode_of(item)
    if not mode or modes.current():
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports_of(item, mode):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)
    return True


def _reports_of(item, mode: str) -> list:
    why = modes.missing(mode, ptxsim(item.config))
    if why:
        return [_report(item, "skipped", (str(item.path), item.location[1] or 0, f"Skipped: {why}"))]
    stash = item.session.stash.setdefault(_reports, {})
    if item.nodeid not in stash:
        group = [i for i in item.session.items if i.path == item.path and mode_of(i) == mode and i.nodeid not in stash]
        stash |= _run(group, mode)
    return stash[item.nodeid]


def _run(items: list, mode: str) -> dict[str, list]:
    """Test id -> reports. Every test has some, even if the process dies, until --maxfail tests have failed."""
    config, found = items[0].config, {}
    most = config.getoption("maxfail") or 0
    with tempfile.TemporaryDirectory() as folder:
        lines, output = Path(folder, "reports"), Path(folder, "output")
        lines.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--ptxsim", str(ptxsim(config))]
        command += [f"--maxfail={most}", *(item.nodeid for item in items)]
        environment = modes.environment(mode) | {_REPORTS: str(lines)}
        with open(output, "w") as file:
            process = subprocess.Popen(command, env=environment, cwd=config.rootpath, stdout=file, stderr=file)
            end = f"{_end(process, lines)}\n{output.read_text()[-6000:]}"
        for line in lines.read_text().splitlines():
            report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
            if isinstance(report.longrepr, list):  # of a skip: (file, line, reason), which JSON made a list
                report.longrepr = tuple(report.longrepr)
            found.setdefault(report.nodeid, []).append(report)
    left = [item for item in items if not any(r.when == "teardown" for r in found.get(item.nodeid, ()))]
    failures = sum(report.failed for reports in found.values() for report in reports)
    if not left or 0 < most <= failures:
        return found
    died = left[:1] if found else left  # without any report, the process did not start
    for item in died:
        found.setdefault(item.nodeid, []).append(_report(item, "failed", f"in the {mode}: {end}"))
    return found | _run(left[1:], mode) if left[len(died) :] else found


def _end(process: subprocess.Popen, lines: Path) -> str:
    """Waits until the process ends, and kills it if no test has ended for LIMIT seconds."""
    while True:
        try:
            return f"the process ended with status {process.wait(timeout=1)}"
        except subprocess.TimeoutExpired:
            if time.time() - lines.stat().st_mtime > LIMIT:
                process.kill()
                process.wait()
                return f"no end within {LIMIT} s"


def _report(item, outcome: str, text):
    return pytest.TestReport(
        item.nodeid, item.location, {item.name: 1}, outcome, text, "call" if outcome == "failed" else "setup"
    )


# ---- in the process of a mode ----


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    mode = mode_of(item)
    if not mode:
        return (yield)
    with modes.entered(mode, ptxsim(item.config)):
        try:
            return (yield)
        except Exception as error:
            if modes.not_checked(error):
                pytest.skip(f"not checked: {error}")
            raise


class _Writer:
    """Writes the report of each phase of a test at once, for the parent process to read."""

    def __init__(self, config, path: str):
        self.config, self.path = config, path

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(self.path, "a") as file:
            file.write(json.dumps(data, default=str) + "\n")


def pytest_configure(config):
    if _REPORTS in os.environ:
        config.pluginmanager.register(_Writer(config, os.environ[_REPORTS]))
