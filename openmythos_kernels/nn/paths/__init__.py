"""The ways a module's call can run, one file each, and the walk that chooses.

A path is a module with

- `WHEN`: the calls it takes, in words;
- `choice(module) -> Choice`: the backend it would run on, as far as the module by itself decides it, and why not
  ("reference": it cannot run);
- `refuses(call) -> str`: why it does not take this call, "" if it does;
- `run(call)`: the result. NotImplemented where a reason not to appears only on the way.

A drop-in module lists its paths, fastest first. Its `forward` is `walk(call)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openmythos_kernels.nn.call import Call

# Told of every path that has run, with its module: `report(model, ids)` listens.
listener: Callable[[Any, Any], None] | None = None


def walk(paths: tuple, call: Call):
    """What the first path gives that does not refuse the call. The last one refuses none."""
    for path in paths:
        if path.refuses(call):
            continue
        result = path.run(call)
        if result is not NotImplemented:
            if listener is not None:
                listener(call.module, path)
            return result
    raise AssertionError("the reference refuses no call")
