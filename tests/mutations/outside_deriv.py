"""Small faults in second and forward-mode derivatives, in tracing, and in what outlives a forward."""

from tests.mutations.mutation import Mutation

_DERIVATIVES, _OP = "openmythos_kernels/ops/derivatives.py", "openmythos_kernels/ops/op.py"
_REPEATED, _LATENTS = "openmythos_kernels/ops/moe/repeated.py", "openmythos_kernels/nn/paths/mla_recompute.py"
_OPS, _MODELS = "tests/contracts/test_derivatives.py -k", "tests/openmythos_kernels/test_derivatives.py -k"

MUTATIONS = [
    Mutation(
        "derivatives: tangents are not looked for",
        _DERIVATIVES,
        "return in_transform() or any(",
        "return in_transform() and any(",
        f"{_OPS} forward_mode_and_transforms",
    ),
    Mutation(
        "derivatives: within a transform tangents of outer levels are not looked for",
        _DERIVATIVES,
        "return in_transform() or any(",
        "return any(",
        f"{_OPS} forward_mode_and_transforms",
    ),
    Mutation(
        "derivatives: a gradient has no graph",
        _DERIVATIVES,
        "if not (torch.is_grad_enabled() and any_requires_grad(args)):\n            return self._kernel",
        "if True:\n            return self._kernel",
        f"{_OPS} second_derivatives",
    ),
    Mutation(
        "derivatives: an argument's gradient holds the graph of another's",
        _DERIVATIVES,
        "x.view_as(x) if want else x for x, want in zip(flat, wanted)",
        "x for x in flat",
        f"{_MODELS} other_forwards",
    ),
    Mutation(
        "derivatives: halting does not depend on the state",
        "openmythos_kernels/ops/loop/formula.py",
        "found + (p - found).detach(), 0,",
        "p, 0,",
        f"{_OPS} second_derivatives",
    ),
    Mutation(
        "derivatives: fused attention has no formula",
        "openmythos_kernels/nn/paths/sdpa.py",
        "if torch.is_grad_enabled():\n",
        "if False:\n",
        f"{_MODELS} functional_interface",
    ),
    Mutation(
        "derivatives: a token with a tangent is decoded as one op",
        "openmythos_kernels/nn/call.py",
        "not (self.compiling or self.transformed or compat.is_in_torch_dispatch_mode())",
        "not (self.compiling or compat.is_in_torch_dispatch_mode())",
        f"{_MODELS} decoded_token",
    ),
    Mutation(
        "derivatives: ops without any do not say so",
        _OP,
        "            if self._function is None:\n",
        "            if False:\n",
        f"{_OPS} raise_errors",
    ),
    Mutation(
        "repeated experts: gradients of the last call alone have a graph",
        _REPEATED,
        "            if sums is not None:\n",
        "            if False:\n",
        f"{_OPS} second_derivatives",
    ),
    Mutation(
        "repeated experts: the graph holds itself",
        _REPEATED,
        "self._anchor = _Weights",
        "self._anchor = self._shared.anchor = _Weights",
        f"{_MODELS} freed_with",
    ),
    Mutation(
        "latents: the backward follows the autocast of its caller",
        _LATENTS,
        "    @staticmethod\n    @uncast\n",
        "    @staticmethod\n",
        f"{_MODELS} uses_the_autocast",
    ),
    Mutation(
        "latents: the backward forgets the autocast of the forward",
        _LATENTS,
        "with torch.enable_grad(), ctx.autocast():",
        "with torch.enable_grad():",
        f"{_MODELS} uses_the_autocast",
    ),
    Mutation(
        "op: a backward is autocast",
        _OP,
        "            backward = uncast(backward)\n",
        "",
        "tests/openmythos_kernels/ops/test_op.py -k autocast",
    ),
    Mutation(
        "op: tensors made in inference mode are saved as they are",
        _OP,
        "tuple(savable(x) for x in args)",
        "tuple(args)",
        f"{_MODELS} made_in_inference_mode",
    ),
    Mutation("op: a tracer does not see it", _OP, "if torch.jit.is_tracing():", "if False:", f"{_MODELS} traced_model"),
    Mutation(
        "op: the class that declines is not named",
        _OP,
        "except (NotImplementedError, TypeError) as",
        "except NotImplementedError as",
        f"{_MODELS} another_class",
    ),
    Mutation(
        "experts: a fake run's counts are kept",
        "openmythos/moe.py",
        "torch.jit.is_tracing() or is_fake(chosen) or",
        "torch.jit.is_tracing() or",
        f"{_MODELS} expert_load",
    ),
    Mutation(
        "loop: a traced model halts where its example did",
        "openmythos_kernels/nn/call.py",
        "torch.jit.is_tracing() or x.is_meta",
        "x.is_meta",
        f"{_MODELS} runs_all_loops",
    ),
    Mutation(
        "loop: a traced reference ends where its example did",
        "openmythos/recurrence.py",
        "torch.jit.is_tracing() or h.is_meta",
        "h.is_meta",
        f"{_MODELS} runs_all_loops",
    ),
]
