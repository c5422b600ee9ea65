"""The class of a swapped open_mythos module: it derives from our class and from the class that it replaces."""

from __future__ import annotations

import copyreg
import functools
import inspect
from typing import Any

from openmythos_kernels.nn.guards import stands_for


class SwappedClass(type):
    """The metaclass of these classes, which are pickled as their two base classes.

    They have the name and module of the class replaced, as wrappers, reports and checkpoints by name expect, so pickle
    would find that class instead.
    """

    replaces: type
    runs: type
    default_generate_loops: int | None


@functools.cache
def swapped_class(ours: type, theirs: Any) -> type:
    """The class for objects of `theirs` that run `ours`; the same object at every call.

    `isinstance(x, theirs)` still holds, as FSDP's wrap policies and open_mythos' own scripts need.
    """
    body = {"__module__": theirs.__module__, "__qualname__": theirs.__qualname__, "__doc__": ours.__doc__}
    made = SwappedClass(theirs.__name__, (ours, theirs), body)
    made.replaces, made.runs = theirs, ours
    if "generate" in vars(theirs):
        made.default_generate_loops = inspect.signature(theirs.generate).parameters["n_loops"].default
    stands_for(made, ours)
    return made


def _reduced(cls: SwappedClass) -> tuple[Any, tuple[type, type]]:
    return swapped_class, (cls.runs, cls.replaces)


copyreg.pickle(SwappedClass, _reduced)
