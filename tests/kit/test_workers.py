"""The whole suite runs in several processes, chosen tests in one."""

import subprocess
import sys

import pytest

from tests.mutations.mutation import ROOT

pytest.importorskip("xdist", reason="pytest-xdist is not installed: pip install -r tests/requirements.txt")


def options(*arguments: str) -> str:
    """The number of processes and the distribution that pytest chooses; the process exits before it collects tests."""
    script = (
        "import sys, pytest\n"
        "class Early:\n"
        "    @pytest.hookimpl(wrapper=True, tryfirst=True)\n"
        "    def pytest_sessionstart(self, session):\n"
        "        print('settled', session.config.option.numprocesses, session.config.option.dist)\n"
        "        pytest.exit('enough', 0)\n"
        "        yield\n"
        "sys.exit(pytest.main(sys.argv[1:], plugins=[Early()]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    found = [line for line in run.stdout.splitlines() if "settled" in line]
    assert found, run.stdout + run.stderr
    return found[0].partition("settled ")[2]


def test_the_whole_suite_runs_in_several_processes():
    processes, dist = options("-m", "not slow").split()
    assert int(processes) >= 1 and dist == "loadfile"


@pytest.mark.parametrize(
    "arguments", [["tests/kit/test_memory.py"], ["-k", "budget"], ["-n", "0"], ["tests/kit", "-k", "memory"]]
)
def test_chosen_tests_run_in_one_process(arguments):
    assert options(*arguments).split()[1] == "no"
