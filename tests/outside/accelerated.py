"""pytest, in a process of open-mythos' own tests: whatever they build of open_mythos.main is accelerated as soon as it is made.

OPEN_MYTHOS_PACKAGE names the folder that `open_mythos` is loaded from, ACCELERATED=1 has modules accelerated.
"""

import builtins
import os
import sys
from importlib import import_module
from types import ModuleType
from unittest import mock

import torch

build_class = builtins.__build_class__


class Accelerated(type):
    """What is made of a class is accelerated when the outermost call has ended; classes and methods stay as they are written."""

    depth = 0

    def __call__(cls, *args, **kwargs):
        Accelerated.depth += 1
        try:
            made = super().__call__(*args, **kwargs)
        finally:
            Accelerated.depth -= 1
        if not Accelerated.depth:
            from openmythos_kernels import accelerate

            accelerate(made)
        return made


def build(body, name, *bases, **named):
    """A class statement of open_mythos.main."""
    if os.environ.get("ACCELERATED") == "1" and torch.nn.Module in bases:
        named["metaclass"] = Accelerated
    return build_class(body, name, *bases, **named)


package = ModuleType("open_mythos")  # without its __init__, which needs transformers
package.__path__ = [os.environ["OPEN_MYTHOS_PACKAGE"]]
sys.modules["open_mythos"] = package
with mock.patch.object(builtins, "__build_class__", build):
    main = package.main = import_module("open_mythos.main")
vars(package).update({name: value for name, value in vars(main).items() if isinstance(value, type)})
