"""pytest, in a process of open-mythos' own tests: whatever they build of open_mythos.main is accelerated as soon as it is made.

OPEN_MYTHOS_PACKAGE names the folder that `open_mythos` is loaded from, ACCELERATED=1 has modules accelerated.
"""

import os
import sys
from importlib import import_module
from types import ModuleType

import torch

package = ModuleType("open_mythos")  # without its __init__, which needs transformers
package.__path__ = [os.environ["OPEN_MYTHOS_PACKAGE"]]
sys.modules["open_mythos"] = package
main = package.main = import_module("open_mythos.main")
vars(package).update({name: value for name, value in vars(main).items() if isinstance(value, type)})


class Accelerated(type):
    """Classes stay what they are, methods too: what is made of one is accelerated when the outermost call has ended."""

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


if os.environ.get("ACCELERATED") == "1":
    for cls in list(vars(main).values()):
        if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
            cls.__class__ = Accelerated
