"""Every path of the repository that the documentation names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# A path has a folder of the repository in front, or is a file in its root; `<...>` and `*` stand for any name.
FOLDERS = "benchmarks building csrc docs examples openmythos openmythos_kernels tests tools .ci".split()
_PATH = re.compile(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./<>*{{}},-]*")
_ROOT_FILE = re.compile(r"(?:[A-Z]{4,}\.md|Makefile|LICENSE|\w+\.(?:toml|yml|cff|in))")
_MODULE = re.compile(r"-m ((?:benchmarks|openmythos|openmythos_kernels|tests|tools)[\w.]*)")


def quoted(text: str) -> list[str]:
    """Everything in single back quotes, outside fenced blocks."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


def paths(text: str) -> set[str]:
    words = {word for code in quoted(text) for word in code.split()}
    return {word.split("::")[0] for word in words if _PATH.fullmatch(word.split("::")[0]) or _ROOT_FILE.fullmatch(word)}


def exists(path: str) -> bool:
    pattern = re.sub(r"<[^>]*>", "*", path)
    options = re.search(r"\{([^}]*)\}", pattern)
    if options:
        return all(exists(pattern.replace(options[0], option)) for option in options[1].split(","))
    return any(ROOT.glob(pattern.rstrip("/")))


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_named_paths_exist(file):
    missing = sorted(path for path in paths(file.read_text()) if not exists(path))
    assert not missing, f"{file.relative_to(ROOT)} names {missing}"


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_named_commands_exist(file):
    for module in set(_MODULE.findall(file.read_text())):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


def test_the_check_sees_a_missing_path():
    assert paths("see `openmythos/nowhere.py` and `tests/<x>/y.py`") == {"openmythos/nowhere.py", "tests/<x>/y.py"}
    assert not exists("openmythos/nowhere.py") and not exists("openmythos/{model,nowhere}.py")
    assert exists("openmythos/{model,moe}.py") and exists("openmythos_kernels/ops/<family>/formula.py")
