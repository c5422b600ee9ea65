"""A pytest plugin for open-mythos' own tests: accelerates every module of open_mythos.main when it is constructed.

OPEN_MYTHOS_PACKAGE names the folder that `open_mythos` is loaded from; ACCELERATED=1 turns the acceleration on.
"""

import os
import sys
from importlib import import_module
from types import ModuleType

import torch


class StandIn(type):
    """Stands for a class in the tests: calling it constructs an instance and accelerates it."""

    def __call__(cls, *args, **kwargs):
        from openmythos_kernels import accelerate

        return accelerate(cls.real(*args, **kwargs))

    def __instancecheck__(cls, made) -> bool:
        return isinstance(made, cls.real)

    def __getattr__(cls, name: str):
        return getattr(cls.real, name)


package = ModuleType("open_mythos")  # without its __init__, which needs transformers
package.__path__ = [os.environ["OPEN_MYTHOS_PACKAGE"]]
sys.modules["open_mythos"] = package
seen = dict(vars(import_module("open_mythos.main")))
if os.environ.get("ACCELERATED") == "1":
    for name, value in seen.items():
        if isinstance(value, type) and issubclass(value, torch.nn.Module):
            seen[name] = StandIn(name, (), {"real": value})
main = package.main = sys.modules["open_mythos.main"] = ModuleType("open_mythos.main")
vars(main).update(seen)
vars(package).update({name: value for name, value in seen.items() if isinstance(value, type)})
