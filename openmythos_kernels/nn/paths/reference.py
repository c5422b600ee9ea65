"""The module of `openmythos` that this one stands in for."""

from __future__ import annotations

from openmythos_kernels.nn.call import Call
from openmythos_kernels.runtime.backends import Choice

WHEN = "every call"


def choice(module) -> Choice:
    return Choice("reference")


def refuses(call: Call) -> str:
    return ""


def run(call: Call):
    return call.by_reference()
