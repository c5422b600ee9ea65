"""Serving: many requests through one looped block, each at a depth of its own; and self-speculation for one."""

from openmythos_kernels.serve.engine import Engine
from openmythos_kernels.serve.request import Handle
from openmythos_kernels.serve.speculation import Speculation, speculative_stream

__all__ = ["Engine", "Handle", "Speculation", "speculative_stream"]
