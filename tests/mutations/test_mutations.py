"""Every fault in the lists can be applied, and its test files exist. `python -m tests.mutations` runs them."""

import re

import pytest

from tests.mutations.mutation import ROOT, Mutation, families
from tests.mutations.record import Record

EVERY = [m for mutations in families().values() for m in mutations]


@pytest.mark.parametrize("mutation", EVERY, ids=lambda m: m.name)
def test_can_be_applied(mutation):
    changed = mutation.applied()
    assert changed != (ROOT / mutation.file).read_text()
    if mutation.file.endswith(".py"):
        compile(changed, mutation.file, "exec")  # a fault in syntax would be caught for nothing
    assert not re.search(r" -m|'", mutation.tests.partition(" -k ")[2])  # all behind -k is one expression, not quoted
    files = [word for word in mutation.tests.partition(" -k ")[0].split() if not word.startswith("-")]
    assert files and all((ROOT / file.partition("::")[0]).exists() for file in files)


def test_names_are_unique():
    names = [m.name for m in EVERY]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("old, times", [("nowhere in that file", 0), ("RMSNorm", 4)])
def test_a_stale_text_is_one_clear_error(old, times, tmp_path):
    (tmp_path / "layers.py").write_text("RMSNorm " * 4)
    with pytest.raises(ValueError, match=f"mutation 'a': '{old}' is found {times} times in layers.py"):
        Mutation("a", "layers.py", old, "", "tests").applied(tmp_path)


def test_verdicts_outlive_the_process_and_end_with_the_text(tmp_path):
    """`--resume` leaves a fault out only if it was caught on the same text."""
    first, second, third = EVERY[:3]
    record = Record(tmp_path / "verdicts.csv")
    record.add("cpu", second, True)
    record.add("cpu", first, False)
    read = Record(tmp_path / "verdicts.csv")
    assert [read.caught(m) for m in (first, second, third)] == [False, True, False]
    assert not read.caught(Mutation(second.name, second.file, second.old, second.new + " ", second.tests))
    assert read.faults() == [first.name, second.name]  # in the order of the lists


def test_the_record_names_faults_of_the_lists():
    assert set(Record().faults()) <= {m.name for m in EVERY}
