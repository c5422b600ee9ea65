"""Every path of the repository and every command that the documentation names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FOLDERS = ("benchmarks", "building", "csrc", "docs", "examples", "openmythos", "openmythos_kernels", "tests", "tools")
# A path begins with a folder of the repository or is a file in its root. `<...>` stands for any name, {a,b} for both.
_PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./<>{{}},-]*")
_ROOT_FILE = re.compile(r"(?:[A-Z]{4,}\.md|Makefile|LICENSE|\w+\.(?:toml|yml|cff|in)|\.ci/run)")
_ENDING = re.compile(
    r"(?!path/|results/)[\w./-]+/[\w.-]+\.(?:py|cpp|cuh?|h|md|csv)"
)  # a part of a path, from some folder on
_LINK = re.compile(r"\]\(([^)#\s]+)\)")
_COMMAND = re.compile(r"-m ((?:benchmarks|openmythos|openmythos_kernels|tests|tools)\b[\w.]*)")


def paths(text: str) -> set[str]:
    """The paths in back quotes, outside fenced blocks."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    words = {word.split("::")[0] for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()}
    return {word for word in words if any(form.fullmatch(word) for form in (_PATH, _ROOT_FILE, _ENDING))}


def exists(path: str) -> bool:
    pattern = re.sub(r"<[^>]*>", "*", path)
    if choice := re.search(r"\{([^}]*)\}", pattern):
        return all(exists(pattern.replace(choice[0], option)) for option in choice[1].split(","))
    if _PATH.fullmatch(path) or _ROOT_FILE.fullmatch(path):
        return any(ROOT.glob(pattern.rstrip("/")))
    return any(any((ROOT / folder).rglob(pattern)) for folder in FOLDERS)


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_named_paths_and_commands_exist(file):
    text = file.read_text()
    missing = sorted(path for path in paths(text) if not exists(path))
    if file.parent == ROOT:  # `make docs` checks those of the chapters
        missing += [link for link in _LINK.findall(text) if not (ROOT / link).exists()]
    for module in set(_COMMAND.findall(text)):
        place = ROOT / module.replace(".", "/")
        if not place.with_suffix(".py").is_file() and not (place / "__main__.py").is_file():
            missing.append(f"python -m {module}")
    assert not missing, f"{file.relative_to(ROOT)} names {missing}"


def test_the_check_sees_a_missing_path():
    assert paths("`openmythos/no.py` and `tests/<x>/y.py`, `launch/z.py -k a`") == {
        "openmythos/no.py",
        "tests/<x>/y.py",
        "launch/z.py",
    }
    assert not exists("openmythos/no.py") and not exists("openmythos/{model,no}.py") and not exists("launch/no.py")
    assert exists("openmythos/{model,moe}.py") and exists("openmythos_kernels/ops/<family>/formula.py")
    assert exists("launch/dense.py")
