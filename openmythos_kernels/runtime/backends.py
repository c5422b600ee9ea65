"""The backend that runs an op, and why no faster one does: a table, and the functions that ask it.

A backend is one of
    cuda        the compiled extension's CUDA kernels
    triton      Triton kernels (NVIDIA and AMD GPUs)
    cpu         the compiled extension's C++ kernels
    reference   the module of `openmythos`, plain PyTorch: always available
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from openmythos_kernels.runtime import extension, unproven

# Asked once, as compilers cannot trace `find_spec`.
_NO_TRITON = "" if importlib.util.find_spec("triton") else "triton is not installed"

BACKENDS = ("cuda", "triton", "cpu", "reference")
_DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",)}

# Every op of `torch.ops.openmythos` and the backends that implement it, the fastest first; the reference is left out,
# as it implements all. Eager calls and the dispatcher, which compiled graphs call, both take the first that can run.
OPS = {
    "moe_experts": ("triton", "cpu"),
    "moe_experts_backward": ("triton", "cpu"),
    "moe_experts_backward_add": ("triton", "cpu"),
    "moe_experts_backward_rows": ("triton", "cpu"),
    "moe_experts_weights": ("triton", "cpu"),
    "moe_route": ("triton", "cpu"),
    "moe_route_backward": ("triton", "cpu"),
    "moe_sort": ("triton",),
    "swiglu_ffn": ("triton", "cpu"),
    "swiglu_ffn_backward": ("triton", "cpu"),
    "mla_attention": ("triton", "cpu"),
    "mla_attention_backward": ("triton", "cpu"),
    "mla_attention_rows": ("triton", "cpu"),
    "mla_attention_rows_backward": ("triton", "cpu"),
    "mla_attend_latent": ("triton",),
    "mla_append": ("triton",),
    "mla_norm_rope": ("triton", "cpu"),
    "mla_norm_rope_backward": ("triton", "cpu"),
    "mla_linear": ("cpu",),
    "mla_linear_backward": ("cpu",),
    "mla_decode": ("triton", "cpu"),
    # On an H200 Triton's forward takes 0.097 ms and CUDA's 0.257; forward and backward take 0.383 ms in this order.
    "loop_step": ("triton", "cuda", "cpu"),
    "loop_step_backward": ("cuda", "triton", "cpu"),
    "loop_lora_step": ("cpu",),
    "loop_lora_step_backward": ("cpu",),
    "loop_down": ("cpu",),
    "loop_down_backward": ("cpu",),
    "compact_active": ("cuda", "cpu"),
    "gather_rows": ("cuda", "cpu"),
    "scatter_rows": ("cuda", "cpu"),
    "rms_norm": ("triton", "cpu"),
    "rms_norm_backward": ("triton", "cpu"),
    "block_decode": ("triton", "cpu"),
    "block_prompt": ("cpu",),
    "loop_decode": ("triton", "cpu"),
    "block_rows": ("cpu",),
    "loop_rows": ("cpu",),
    "linear_rows": ("cpu",),
}


# Ops whose Triton kernels no GPU has run. Calls by name run them; they are chosen with the switch alone.
UNPROVEN = frozenset({"block_decode", "loop_decode"})


@dataclass(frozen=True)
class Exemption:
    """A function of the compiled extension that is no op.

    Attributes:
        why: what keeps it from being one.
        checked_by: the test file that compares it with the reference.
    """

    why: str
    checked_by: str


# Functions of the extension module, by name. `torch.compile`, `verify` and `opcheck` see none of them.
EXEMPTIONS = {
    "moe_inference": Exemption(
        "calls back into Python for the router's logits and the chosen experts' weights while other threads compute",
        "tests/openmythos_kernels/nn/paths/test_moe_inference.py",
    ),
    "layer_weight_names": Exemption(
        "lists the names of the weights of whole-layer ops, and computes nothing",
        "tests/openmythos_kernels/ops/test_layer.py",
    ),
    "is_causal": Exemption(
        "answers a question of the host about a CPU mask, True or False, where an op returns tensors",
        "tests/openmythos_kernels/ops/mla/test_is_causal.py",
    ),
}


@dataclass(frozen=True)
class Choice:
    """A backend, and why no faster one runs (empty if none is faster)."""

    backend: str
    reason: str = ""

    @property
    def fast(self) -> bool:
        return self.backend != "reference"


def unavailable(op: str, backend: str, device: str) -> str:
    """Why `backend` cannot run `op` on tensors of this device type; empty if it can."""
    if backend == "reference":
        return ""
    if backend not in OPS[op]:
        return f"{op} has no {backend} kernel in this version"
    if device not in _DEVICES[backend]:
        return f"the {backend} kernel does not run on {device} tensors"
    if backend == "cuda":
        return extension.cuda_reason()
    if backend == "triton":
        if op in UNPROVEN and not unproven.allowed():
            return f"no GPU has run {op}'s triton kernels yet: {unproven.SWITCH}=1 selects them"
        return _NO_TRITON
    return extension.reason or ""


def choose(op: str, device: str) -> Choice:
    """The fastest backend that can run `op` on this device type. Under `forcing` it is the forced one, or the reference
    if the op has no such kernel."""
    if (name := forced()) is not None:
        return Choice(name) if name in OPS[op] else Choice("reference", f"{op} has no {name} kernel in this version")
    if torch.compiler.is_compiling():  # compilers trace into functools.cache, and warn
        return fastest(op, device)
    return _remembered(op, device, extension.reason, unproven.allowed())


@functools.cache  # decoding asks dozens of times a token
def _remembered(op: str, device: str, _reason: str | None, _unproven: bool) -> Choice:
    return fastest(op, device)


def fastest(op: str, device: str) -> Choice:
    """`choose` without `forcing`."""
    reasons = []
    if not any(device in devices for devices in _DEVICES.values()):
        reasons.append(f"there are no kernels for {device} tensors")
    for backend in (*OPS[op], *(b for b in BACKENDS if b not in OPS[op])):
        if _DEVICES.get(backend) and device not in _DEVICES[backend]:
            continue  # kernels for another device need no reason
        reason = unavailable(op, backend, device)
        if not reason:
            return Choice(backend, "; ".join(reasons))
        reasons.append(reason)
    raise AssertionError("the reference is always available")


def require(op: str, backend: str, device: str) -> None:
    """Checks that a backend asked for by name can run the op.

    Raises:
        ValueError: if there is no such backend.
        RuntimeError: if it cannot run the op, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be auto or one of {', '.join(BACKENDS)}")
    reason = unavailable(op, backend, device)
    if reason:
        raise RuntimeError(f"backend = {backend!r} cannot run {op}: {reason}")


_forced: ContextVar[str | None] = ContextVar("backend", default=None)


def forced() -> str | None:
    """The backend set by `forcing`, or None. Compiled code is never forced, as compilers cannot trace a ContextVar."""
    return None if torch.compiler.is_compiling() else _forced.get()


@contextlib.contextmanager
def forcing(backend: str) -> Iterator[None]:
    """Within the context, ops run this backend's implementation on tensors of any device.

    For tests and tools: Triton's launches on CPU tensors under its interpreter, or on meta tensors to record launches;
    CUDA kernels on CPU tensors where tests/cuda_on_cpu has loaded them. Run backward passes inside the context, too.
    """
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)
