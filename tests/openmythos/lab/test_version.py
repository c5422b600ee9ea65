"""The digest of a run's code: what it reaches counts, what only reads results does not."""

import importlib.util
import sys
from textwrap import dedent

import pytest

from openmythos.lab.version import code_digest

BASE = """
    from openmythos.lab.statistics import summary
    RATE = 3
    TABLE = {"a": 1}

    class Base:
        def value(self):
            return 1

    class Part(Base):
        def more(self):
            return helper(2)

    def helper(x):
        return x * RATE

    def compute(settings, tick):
        return [Part().value(), TABLE["a"], (lambda: deep())(), summary([1.0])]

    def deep():
        return 4

    def judge(settings, results):
        return 1
    """


@pytest.fixture
def digest(tmp_path):
    def of(text):
        path = tmp_path / f"code{len(list(tmp_path.iterdir()))}.py"
        path.write_text(dedent(text))
        spec = importlib.util.spec_from_file_location("code_of_a_run", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["code_of_a_run"] = module
        spec.loader.exec_module(module)
        return code_digest(module.compute)

    yield of
    sys.modules.pop("code_of_a_run", None)


@pytest.mark.parametrize(
    "old, new",
    [
        ("return 4", "return 5"),
        ("RATE = 3", "RATE = 4"),
        ('{"a": 1}', '{"a": 2}'),
        ("x * RATE", "RATE + x"),
        ("            return 1\n\n    class Part", "            return 2\n\n    class Part"),
        ("[1.0]", "[2.0]"),
    ],
)
def test_what_a_run_reaches_counts(digest, old, new):
    assert old in BASE and digest(BASE) != digest(BASE.replace(old, new))


@pytest.mark.parametrize(
    "old, new",
    [
        ("return 4", "return 4  # four"),
        ("return 4", '"""Four."""\n        return 4'),
        ("results):\n        return 1", "results):\n        return 2"),
    ],
)
def test_comments_and_verdicts_do_not(digest, old, new):
    assert old in BASE and digest(BASE) == digest(BASE.replace(old, new))


def test_a_module_of_the_laboratory_counts(digest, monkeypatch):
    from openmythos.lab import statistics

    before = digest(BASE)
    monkeypatch.setattr(statistics, "summary", statistics.spearman)
    assert digest(BASE) != before
