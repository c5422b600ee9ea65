"""A small fault, and the tests that must catch it."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FEATURES = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Mutation:
    """A fault in one file.

    Attributes:
        name: what is wrong, in words.
        file: its path, relative to the root of the repository.
        old: text that occurs exactly once in the file; any white space in it matches any other.
        new: the text that replaces it.
        tests: arguments of pytest, such as "FILE -k EXPRESSION". At least one of the selected tests must fail.
        needs: the processor's feature without which the file's code does not run, as Linux spells it, or "".
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    needs: str = ""

    @property
    def runs_here(self) -> bool:
        """Whether this processor has the feature."""
        return not self.needs or (_FEATURES.exists() and self.needs in _FEATURES.read_text().split())

    def applied(self, root: Path = ROOT) -> str:
        """The text of the file with the fault.

        Raises:
            ValueError: `old` does not occur exactly once, or `new` equals it.
        """
        text = (root / self.file).read_text()
        found = list(re.finditer(_up_to_line_breaks(self.old), text))
        if len(found) != 1 or self.old == self.new:
            raise ValueError(
                f"mutation {self.name!r}: {self.old!r} is found {len(found)} times in {self.file}; "
                "it must be found once and differ from the new text"
            )
        return text[: found[0].start()] + self.new + text[found[0].end() :]


def _up_to_line_breaks(text: str) -> str:
    """A pattern of the text in which white space between words stands for any, and indentation and a line's end for
    themselves."""
    head = r"(?<=\n)[ \t]+" if text.startswith("    ") else r"\s+" if text[0].isspace() else ""
    tail = r"[ \t]*\n" if text.endswith("\n") else r"\s+" if text[-1].isspace() else ""
    return head + r"\s+".join(map(re.escape, text.split())) + tail


def families() -> dict[str, list[Mutation]]:
    """File name -> MUTATIONS, for every file in this folder that has such a list."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = {
        name: importlib.import_module(f"tests.mutations.{name}")
        for name in names
        if not name.startswith(("_", "test_"))
    }
    return {name: module.MUTATIONS for name, module in modules.items() if hasattr(module, "MUTATIONS")}
