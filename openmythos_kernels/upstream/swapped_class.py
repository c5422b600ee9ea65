"""The class that a swapped module of open_mythos gets: one of ours that also derives from the class it replaces."""

from __future__ import annotations

import copyreg
import functools
import inspect

from openmythos_kernels.nn.guards import stands_for


class SwappedClass(type):
    """The metaclass of these classes, by which they are pickled as the pair that they are made of.

    Their names and modules are those of the class replaced, as wrappers, reports and checkpoints by name expect, so
    pickle would find that class instead.
    """


@functools.cache
def swapped_class(ours: type, theirs: type) -> type:
    """The class for objects of `theirs` that are to run `ours`; always the same for a pair.

    `isinstance(x, theirs)` goes on to hold, which FSDP's wrap policies and open_mythos' own scripts ask.
    """
    body = {"__module__": theirs.__module__, "__qualname__": theirs.__qualname__, "__doc__": ours.__doc__}
    made = SwappedClass(theirs.__name__, (ours, theirs), body)
    made.replaces, made.runs = theirs, ours
    if "generate" in vars(theirs):
        made.default_generate_loops = inspect.signature(theirs.generate).parameters["n_loops"].default
    stands_for(made, ours)
    return made


copyreg.pickle(SwappedClass, lambda cls: (swapped_class, (cls.runs, cls.replaces)))
