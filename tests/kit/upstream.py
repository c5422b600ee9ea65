"""The public `open-mythos` package, which tests compare with."""

from benchmarks.upstream import load_upstream

__all__ = ["load_upstream"]
