"""Rewrites the two CUDA constructs that are not C++. Line numbers stay."""

from __future__ import annotations

import re

_EXTERN_SHARED = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?([A-Za-z_][\w: ]*?)\s+(\w+)\[\];")


def translate(source: str) -> str:
    """`kernel<<<configuration>>>(...)` becomes `cuda_on_cpu::launch(kernel, configuration)(...)`.

    `extern __shared__ T name[];` becomes a pointer to the launch's dynamic shared memory.
    """
    source = _EXTERN_SHARED.sub(r"auto* \2 = static_cast<\1*>(cuda_on_cpu::dynamic_shared());", source)
    while (at := source.find("<<<")) >= 0:
        name = _start_of_name(source, at)
        end = source.index(">>>", at)
        kernel, configuration = source[name:at].rstrip(), source[at + 3 : end]
        source = f"{source[:name]}cuda_on_cpu::launch({kernel}, {configuration}){source[end + 3 :]}"
    return source


def _start_of_name(source: str, end: int) -> int:
    """The start of the kernel's name, with its template arguments, that ends before `end`."""
    at = len(source[:end].rstrip())
    if source[at - 1] == ">":
        depth = 0
        while True:
            at -= 1
            depth += (source[at] == ">") - (source[at] == "<")
            if depth == 0:
                break
    while at and (source[at - 1].isalnum() or source[at - 1] in "_:"):
        at -= 1
    return at
