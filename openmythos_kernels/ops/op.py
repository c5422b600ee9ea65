"""One custom operator, declared once and callable two ways.

`torch.ops.openmythos.<name>` is what compilers see: schema, fake, autograd and one kernel per device. PyTorch's
autograd for operators registered in Python costs tens of microseconds a call, more than a decode kernel. So eager calls
on plain tensors take a direct path: the same device kernel below autograd, in an `autograd.Function` made from the same
`setup_context` and `backward`. Function transforms, forward mode and tracers take the paths of
`openmythos_kernels.ops.derivatives`.
"""

from __future__ import annotations

import importlib

import torch

from openmythos.compat import (
    applied,
    autograd_kernel,
    below_autograd,
    is_fake,
    is_in_torch_dispatch_mode,
    kernel_of,
    redispatch_to_cuda,
    register_kernel,
    schema_of,
    transformed,
)
from openmythos_kernels.ops.derivatives import Formula, by_formula, needs_formula, uncast
from openmythos_kernels.ops.flat import any_requires_grad, flatten, savable, unflatten
from openmythos_kernels.runtime import backends  # loading the extension registers its kernels

LIBRARY = torch.library.Library("openmythos", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_KNOWN = {*_PLAIN, int, float, bool, type(None)}


class Op:
    """A function of tensors named `openmythos::<name>`.

    Args:
        schema: `name(Tensor x, Tensor[] weights, ...) -> ...` in torch.library's language.
        fake: returns empty outputs of the right shapes and dtypes; same signature as the op.
        setup_context: `(ctx, inputs, output)`, as in `torch.library.register_autograd`.
        backward: `(ctx, *grads) -> one gradient (or None, or list) per input`.
        triton: "module:function" of the launch, which has the op's signature; imported at the first call. It serves GPU
            tensors if it comes first in the op's row of `backends.OPS`, in eager calls and compiled graphs alike.
            float64, which Triton's kernels do not take, goes to the extension's CUDA kernel if there is one.
        formula: the op in PyTorch's own operators, with the op's arguments and results; an empty tensor stands for a
            result that only the backward reads. It computes wherever a tangent or a batch dimension of `torch.func`
            follows the arguments.
    """

    def __init__(
        self, schema: str, *, fake, setup_context=None, backward=None, triton: str = "", formula: Formula | None = None
    ):
        self.name = schema.split("(")[0].strip()
        LIBRARY.define(schema)
        qualified = f"openmythos::{self.name}"
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        self.overload = getattr(torch.ops.openmythos, self.name).default
        self._triton = triton
        self._compiled = kernel_of(self.overload, "CUDA")  # the extension's
        first = backends.fastest(self.name, "cuda").backend if self.name in backends.OPS else "triton"
        self._launches = bool(triton) and (self._compiled is None or first == "triton")
        if self._launches:
            register_kernel(LIBRARY, self.name, self._on_gpu, "CUDA")
        self._function, self._formula = None, formula
        if backward is not None:
            backward = uncast(backward)
            self._by_autograd = autograd_kernel(self.overload, backward, setup_context)
            LIBRARY.impl(self.name, self._dispatched, "Autograd", with_keyset=True)
            self._function = _direct_function(self, setup_context, backward)

    def launch(self, *args):
        """Runs the Triton launch, whatever the tensors' device."""
        module, _, function = self._triton.partition(":")
        launch = getattr(importlib.import_module(module), function)
        device = _first_tensor(args).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):  # Triton launches on the current GPU
            return launch(*args)

    def _on_gpu(self, *args):
        """The kernel for GPU tensors where Triton comes first."""
        if self._compiled is not None and _first_tensor(args).dtype == torch.float64:
            return self._compiled(*args)
        return self.launch(*args)

    def below_autograd(self, *args):
        """Runs the kernel of the tensors' device, or of the forced backend, without autograd."""
        forced = backends.forced()
        if forced == "triton":
            if not self._triton:
                raise RuntimeError(f"{self.name} has no triton kernel")
            return self.launch(*args)
        if forced == "cuda":
            return redispatch_to_cuda(self.overload, *args) if self._compiled is None else self._compiled(*args)
        if self._launches and _first_tensor(args).is_cuda:  # the dispatcher would do the same, and box every argument
            return self._on_gpu(*args)
        with below_autograd():
            return self.overload(*args)

    def __call__(self, *args):
        if torch.compiler.is_compiling():
            return self.overload(*args)
        if transformed():
            if torch.jit.is_tracing():
                return self.overload(*args)
            if needs_formula(args):
                return self._differentiated(args)
        if torch.is_grad_enabled() and any_requires_grad(args):
            if self._function is None:
                raise RuntimeError(
                    f"{self.name} has no derivatives: call it under torch.no_grad(), "
                    "or openmythos_kernels.restore(model) first"
                )
            args = tuple(savable(x) for x in args)
            if self._is_direct(args):
                flat, layout = flatten(args)
                return applied(self._function, layout, *flat)
        elif self._is_direct(args):
            return self.below_autograd(*args)
        return self._of_subclasses(args)

    def _is_direct(self, args) -> bool:
        return backends.forced() is not None or (_all_plain(args) and not is_in_torch_dispatch_mode())

    def _of_subclasses(self, args):
        """Calls through the dispatcher, which asks tensor subclasses how they handle the op."""
        try:
            return self.overload(*args)
        except (NotImplementedError, TypeError) as error:
            for argument, given in zip(schema_of(self.overload).arguments, args):
                for i, x in enumerate(given if isinstance(given, (list, tuple)) else [given]):
                    if isinstance(x, torch.Tensor) and type(x) not in _PLAIN and not is_fake(x):
                        name = f"{argument.name}[{i}]" if isinstance(given, (list, tuple)) else argument.name
                        raise TypeError(
                            f"{self.name}: {name} is a {type(x).__name__}, which does not handle this op; "
                            f"must be a plain tensor or parameter"
                        ) from error
            raise

    def _differentiated(self, args):
        """Evaluates the formula, which PyTorch can differentiate in any way."""
        if self._formula is None:
            raise RuntimeError(
                f"{self.name} has neither forward-mode derivatives nor a rule for torch.func's transforms: "
                "openmythos_kernels.restore(model) brings back modules that have"
            )
        found = by_formula(self._formula, args)
        return found if len(schema_of(self.overload).returns) > 1 else found[0]

    def _dispatched(self, keyset, *args):
        """The op's kernel for the key "Autograd": serves compilers and direct calls of the overload."""
        if transformed() and not torch.compiler.is_compiling() and needs_formula(args):
            return self._differentiated(args)
        return self._by_autograd(keyset, *args)


def _direct_function(op, setup_context, backward):
    """The op as an autograd.Function; lists of tensors are flattened, as autograd follows tensors only."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(layout, *flat):
            return op.below_autograd(*unflatten(flat, layout))

        @staticmethod
        def setup_context(ctx, inputs, output):
            layout, *flat = inputs
            ctx.layout = layout
            setup_context(ctx, unflatten(flat, layout), output)

        @staticmethod
        def backward(ctx, *grads):
            result = backward(ctx, *grads)
            result = result if isinstance(result, tuple) else (result,)
            flat = [None]
            for grad, length in zip(result, ctx.layout):
                if length is None:
                    flat.append(grad)
                else:
                    flat.extend([None] * length if grad is None else grad)
            return tuple(flat)

    Direct.__name__ = op.name
    return Direct


def _first_tensor(args) -> torch.Tensor:
    return next(arg for arg in args if isinstance(arg, torch.Tensor))


def _all_plain(args) -> bool:
    """True if no tensor is of a subclass. Without a line of Python for each of a list: a token has hundreds."""
    for arg in args:
        kind = type(arg)
        if kind is list or kind is tuple:
            if not _KNOWN.issuperset(map(type, arg)):
                return False
        elif kind not in _KNOWN:
            return False
    return True
