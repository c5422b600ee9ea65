"""One small fault, and the tests that must notice it."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """A fault seeded into one file.

    Attributes:
        name: what is wrong, in words.
        file: from the root of the repository.
        old: text found exactly once in the file, up to how it is broken into lines. new: what stands there instead.
        tests: what pytest is given, split at spaces ("FILE -k EXPRESSION" and the like); at least one test of these
            must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str

    def applied(self, root: Path = ROOT) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: `old` is not there exactly once, or `new` changes nothing.
        """
        text = (root / self.file).read_text()
        found = list(re.finditer(_up_to_line_breaks(self.old), text))
        if len(found) != 1 or self.old == self.new:
            raise ValueError(
                f"mutation {self.name!r}: {self.old!r} is found {len(found)} times in {self.file}, must be once, "
                "and be replaced by another text"
            )
        return text[: found[0].start()] + self.new + text[found[0].end() :]


def _up_to_line_breaks(text: str) -> str:
    """A pattern of the text in which white space stands for any."""
    return r"\s+".join(re.escape(part) for part in re.split(r"\s+", text))


def families() -> dict[str, list[Mutation]]:
    """The list of every file beside this one that has one, by the file's name."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = {
        name: importlib.import_module(f"tests.mutations.{name}")
        for name in names
        if not name.startswith(("_", "test_"))
    }
    return {name: module.MUTATIONS for name, module in modules.items() if hasattr(module, "MUTATIONS")}
