"""open-mythos' own tests pass on accelerated classes, except for those that fail on the plain classes.

The test file comes from a clone of its repository and runs on the classes of that clone and of the installed release.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from tests.mutations.mutation import ROOT
from tests.outside import clone

pytestmark = pytest.mark.skipif(bool(clone.missing()), reason=clone.missing())


def failures(package: Path, folder: Path, accelerated: bool) -> tuple[set[str], int]:
    """Returns the names of the tests that fail, and how many tests ran."""
    out = folder / f"{accelerated}.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.outside.accelerated",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        "-c",
        "/dev/null",
        "--import-mode=importlib",
        f"--junitxml={out}",
        str(clone.folder() / "tests" / "test_main.py"),
    ]
    environment = {
        **os.environ,
        "OPEN_MYTHOS_PACKAGE": str(package),
        "ACCELERATED": str(int(accelerated)),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=600)
    assert run.returncode in (0, 1), run.stdout[-3000:] + run.stderr[-3000:]
    cases = list(xml.parse(out).iter("testcase"))
    failed = {
        f"{case.get('classname')}.{case.get('name')}"
        for case in cases
        if any(child.tag in ("failure", "error") for child in case)
    }
    return failed, len(cases)


@pytest.mark.parametrize("release", ["head", pytest.param("installed", marks=pytest.mark.slow)])
def test_acceleration_fails_no_test(tmp_path, upstream, release):
    package = Path(upstream.__file__).parent if release == "installed" else clone.folder() / "open_mythos"
    before, ran = failures(package, tmp_path, accelerated=False)
    after, again = failures(package, tmp_path, accelerated=True)
    assert ran == again > 50
    assert after <= before, sorted(after - before)
