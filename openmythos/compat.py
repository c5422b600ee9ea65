"""The parts of PyTorch that are not public and that this repository uses, each under a name that says what it is for.

Nothing else here reaches into PyTorch's private modules, so a new release is checked by reading this file. All names
are in PyTorch 2.9, the oldest release supported; a comment gives the first release that has them where it matters.
When a release drops one, importing `openmythos` fails with that name, except where a function says otherwise.

Aliases are the private functions themselves: decoding calls some of them hundreds of times a token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as _modules

try:
    from torch._C import (
        _AutoDispatchBelowAutograd,
        _current_graph_task_id,
        _dispatch_has_kernel_for_dispatch_key,
        _get_tracing_state,
    )
    from torch._C._autograd import _top_saved_tensors_default_hooks
    from torch._C._functorch import (
        TransformType,
        get_interpreter_stack,
        get_unwrapped,
        is_functorch_wrapped_tensor,
        is_gradtrackingtensor,
        maybe_current_level,
    )
    from torch._functorch.utils import unwrap_dead_wrappers
    from torch._guards import detect_fake_mode
    from torch._library.autograd import Info, make_autograd_impl
    from torch._subclasses.fake_tensor import FakeTensor, is_fake
    from torch._subclasses.functional_tensor import FunctionalTensor
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode
except ImportError as error:
    raise ImportError(
        f"PyTorch {torch.__version__} lacks a private name that openmythos uses ({error}); "
        "install PyTorch 2.9 or a later release that this version of openmythos was tested with"
    ) from error

__all__ = [
    "FSDP_PART",
    "GLOBAL_MODULE_HOOKS",
    "STAND_INS",
    "applied",
    "at_end_of_backward",
    "autograd_kernel",
    "backward_pass",
    "below_autograd",
    "fake_mode_active",
    "foreach_copy_",
    "forward_mode_open",
    "has_kernel",
    "ignore_in_ddp",
    "in_transform",
    "in_vmap",
    "is_fake",
    "is_fsdp",
    "is_in_torch_dispatch_mode",
    "is_transform_wrapper",
    "kernel_of",
    "redispatch_to_cuda",
    "register_kernel",
    "saved_tensors_are_hooked",
    "schema_of",
    "tracing_with_jit",
    "transformed",
    "without_grad_levels",
]

# --- Autograd ---------------------------------------------------------------------------------------------------------

# backward_pass() -> int: the number of the backward pass that runs in this thread, -1 outside of one. Since 2.0.
backward_pass = _current_graph_task_id

# at_end_of_backward(function): called once when the backward pass that runs now is through. DDP and FSDP use it, too.
at_end_of_backward = torch.autograd.Variable._execution_engine.queue_callback

# A context in which the dispatcher skips autograd. `torch.no_grad` would not do: it still visits the autograd kernels.
below_autograd = _AutoDispatchBelowAutograd


def saved_tensors_are_hooked() -> bool:
    """True if `torch.autograd.graph.saved_tensors_hooks` are set, as they are under activation checkpointing.

    The argument `ignore_is_tracing` came after 2.4.
    """
    return _top_saved_tensors_default_hooks(False) is not None


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`. Eager calls skip the inspection of the forward's signature, which looks for defaults and
    takes 16 of `apply`'s 23 us."""
    if in_transform() or torch.compiler.is_compiling():
        return function.apply(*args)
    eager: Any = super(torch.autograd.Function, function)
    return eager.apply(*unwrap_dead_wrappers(args))


# --- Transforms of torch.func, forward mode, tracers ------------------------------------------------------------------


def tracing_with_jit() -> bool:
    """True while `torch.jit.trace` records; `torch.jit.is_tracing`, the public function, takes longer to say so."""
    return _get_tracing_state() is not None


def in_transform() -> bool:
    """True inside any transform of `torch.func` (grad, vjp, jvp, vmap, functionalize)."""
    return maybe_current_level() is not None


def in_vmap() -> bool:
    """True if one of the open transforms of `torch.func` is vmap."""
    return any(transform.key() == TransformType.Vmap for transform in get_interpreter_stack() or ())


def forward_mode_open() -> bool:
    """True inside `torch.autograd.forward_ad.dual_level` or a transform that opens a level."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """True if more than eager autograd follows this call: forward mode, a transform of `torch.func`, `torch.jit.trace`.

    What a kernel computes may then not be the whole result. One expression, as every op asks at every call.
    """
    return forward_ad._current_level >= 0 or maybe_current_level() is not None or _get_tracing_state() is not None


# True if the tensor is a wrapper of a transform: of vmap, grad or functionalize.
is_transform_wrapper = is_functorch_wrapped_tensor


def without_grad_levels(x: Tensor) -> Tensor:
    """The tensor inside the wrappers that `torch.func.grad` and `vjp` put around x; x itself if there are none."""
    while is_gradtrackingtensor(x):
        x = get_unwrapped(x)
    return x


# --- Fake tensors, dispatch modes -------------------------------------------------------------------------------------

# Tensor classes that stand for plain tensors while a graph is made. FunctionalTensor came with 2.1.
STAND_INS = (FakeTensor, FunctionalTensor)


def fake_mode_active(*inputs: Tensor) -> bool:
    """True if a FakeTensorMode is active or one of the inputs is fake. Shapes are then known and values are not."""
    return detect_fake_mode(inputs) is not None


def capturing(device: torch.device) -> bool:
    """True if work on this device is being captured as a CUDA graph, which may not wait for the host."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# `is_fake(x)`: the same of one tensor, also where x is a functional or wrapped tensor around a fake one.
# `is_in_torch_dispatch_mode()`: a TorchDispatchMode (a profiler, a counter, FakeTensorMode) sees every op. Since 2.5.


# --- Modules ----------------------------------------------------------------------------------------------------------

# The dictionaries of hooks that `torch.nn.modules.module.register_module_*_hook` fills: they apply to every module.
GLOBAL_MODULE_HOOKS = tuple(
    getattr(_modules, "_global" + name)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
)

# The submodule inside a module that FSDP1 wraps. No such name, no such wrapper: nothing is found and nothing fails.
FSDP_PART = "_fsdp_wrapped_module"


def is_fsdp(module: torch.nn.Module) -> bool:
    """True for a module under FSDP1 or FSDP2 (`fully_shard`, which adds the method `_get_fsdp_state`, since 2.6)."""
    return FSDP_PART in module._modules or hasattr(module, "_get_fsdp_state")


def ignore_in_ddp(module: torch.nn.Module, names: list[str]) -> None:
    """DistributedDataParallel(module) will leave the parameters of these names alone. Since 1.8."""
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


# --- Custom operators -------------------------------------------------------------------------------------------------

_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def has_kernel(name: str, key: str) -> bool:
    """True if the operator `namespace::name` has a kernel for the dispatch key "CPU", "CUDA", ..."""
    return _dispatch_has_kernel_for_dispatch_key(name, key)


def kernel_of(overload: torch._ops.OpOverload, key: str) -> Callable[..., Any] | None:
    """`kernel(*args)` that stays the one registered now for the dispatch key, whatever overrides it; None if none is.

    By `torch.library.get_kernel`, which is public and new in 2.9.
    """
    if not has_kernel(overload.name(), key):
        return None
    kernel = torch.library.get_kernel(overload.name(), key)
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(*args):
        with _AutoDispatchBelowAutograd():
            return kernel.call_boxed(keyset, *args)

    return call


def register_kernel(library: torch.library.Library, name: str, kernel: Callable, key: str) -> None:
    """`library.impl(name, kernel, key)` without PyTorch's warning where it overrides a kernel of C++."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        library.impl(name, kernel, key)


def redispatch_to_cuda(overload: torch._ops.OpOverload, *args: Any) -> Any:
    """Calls the operator's CUDA kernel whatever device the tensors are on."""
    with _AutoDispatchBelowAutograd():
        return overload.redispatch(_CUDA, *args)


def autograd_kernel(overload: torch._ops.OpOverload, backward: Callable, setup_context: Callable | None) -> Callable:
    """`kernel(keyset, *args)` for the key "Autograd", as `torch.library.register_autograd` makes it (since 2.4).

    The public function registers the kernel at once; an op here asks for derivatives of other kinds first.
    """
    return make_autograd_impl(overload, Info(backward, setup_context))


def schema_of(overload: torch._ops.OpOverload) -> torch._C.FunctionSchema:
    """The operator's schema, with `arguments` and `returns`."""
    return overload._schema


# foreach_copy_(to, tensors): `to[i].copy_(tensors[i])` in a few launches. Since 2.1.
foreach_copy_ = torch._foreach_copy_
