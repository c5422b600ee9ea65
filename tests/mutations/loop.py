"""Small faults in the loop step, its Triton kernels and the loop over a shrinking batch."""

from tests.mutations.mutation import Mutation

_TRITON = "tests/triton_on_cpu/test_specifications.py -k interpreter-loop_step-float32"
_LEAVING = "tests/openmythos_kernels/nn/paths/test_early_exit.py"
_BUDGET = "tests/openmythos_kernels/ops/test_specifications.py -k budget and"
_PARTS = "tests/openmythos_kernels/ops/test_loop_parts.py"
_KERNELS = "openmythos_kernels/ops/loop/kernels/step.py"
_LOOP = "openmythos_kernels/nn/paths/early_exit.py"

MUTATIONS = [
    Mutation(
        "triton step: padding takes part in the norm",
        _KERNELS,
        "state = tl.where(both, stored.to(tl.float32), 0.0)",
        "state = stored.to(tl.float32) + 1e-3",
        _TRITON,
    ),
    Mutation(
        "triton step: one rank of the LoRA is left out",
        _KERNELS,
        "for k in range(RANK):",
        "for k in range(1, RANK):",
        _TRITON,
    ),
    Mutation(
        "triton step: halted positions go on adding",
        _KERNELS,
        "return tl.where(running, weight, 0.0), remainder",
        "return weight, remainder",
        _TRITON,
    ),
    Mutation(
        "triton step: the decay forgets log_dt",
        _KERNELS,
        "log_rate = tl.load(log_dt).to(tl.float32) +",
        "log_rate = 0.0 * tl.load(log_dt).to(tl.float32) +",
        _TRITON,
    ),
    Mutation(
        "triton backward: the norm's second term has the wrong power",
        _KERNELS,
        "-on_norm / D * scale * scale * scale",
        "-on_norm / D * scale * scale",
        _TRITON,
    ),
    Mutation(
        "triton backward: the last row is left out",
        _KERNELS,
        "last = tl.minimum(first + rows_each, N)",
        "last = tl.minimum(first + rows_each, N - 1)",
        _TRITON,
    ),
    Mutation(
        "triton backward: the remainder's gradient misses the ponder cost",
        _KERNELS,
        "on_weight, 0.0) + gp",
        "on_weight, 0.0)",
        _TRITON,
    ),
    Mutation(
        "triton sums: the first row block is skipped",
        _KERNELS,
        "for b in range(blocks):",
        "for b in range(1, blocks):",
        _TRITON,
    ),
    Mutation(
        "early exit: a position too many is cut",
        _LOOP,
        "length = max(reach, 1)",
        "length = max(reach - 1, 1)",
        _LEAVING,
    ),
    Mutation(
        "early exit: positions are cut though the mask is not causal",
        _LOOP,
        "return isinstance(mask, CausalMask) and mask.start == 0",
        "return True",
        _LEAVING,
    ),
    Mutation(
        "early exit: results come back in the order they left",
        _LOOP,
        "back = torch.cat(self.places).argsort()",
        "back = torch.cat(self.places)",
        _LEAVING,
    ),
    Mutation(
        "early exit: a rank whose positions have all halted stops alone",
        _LOOP,
        "if not kept and self.distributed:",
        "if False:",
        f"{_LEAVING} -k ranks",
    ),
    Mutation(
        "early exit: gradients reach loops that should have none",
        "openmythos/loop.py",
        "torch.where(without.view(-1, *[1] * (y.dim() - 1)), y.detach(), y) if",
        "y if",
        f"{_LEAVING} -k truncated",
    ),
    Mutation(
        "early exit: a sequence's last loop does not spend the rest",
        _LOOP,
        "part, t, last))",
        "part, t, False))",
        f"{_LEAVING} -k per_sequence",
    ),
    Mutation(
        "residual injection: the block's input is not subtracted",
        "openmythos_kernels/nn/paths/fused_step.py",
        "f, lora = (f - call.u if residual else f),",
        "f, lora = f,",
        "tests/openmythos_kernels/ops/test_loop.py -k whole_block",
    ),
    Mutation(
        "down-projection: the last output is that of another row",
        "csrc/cpu/loop/down.h",
        "out[(row + r) * rank + k + j] =",
        "out[(row + (r ^ (K == 1 && R > 1))) * rank + k + j] =",
        f"{_PARTS} -k down",
    ),
    Mutation(
        "step with the LoRA inside: its coordinates are not scaled",
        "csrc/cpu/loop/down.h",
        "acc_t<T>(T(acc_t<T>(raw) * acc_t<T>(scale)))",
        "acc_t<T>(raw)",
        f"{_BUDGET} loop_lora_step",
    ),
    Mutation(
        "step with the LoRA inside, backward: rows alone do not send their gradient through the projection",
        "csrc/cpu/loop/step_backward.cpp",
        "df[r] = fma(g, w, df[r]);",
        "if (R > 1) df[r] = fma(g, w, df[r]);",
        f"{_BUDGET} loop_lora_step",
    ),
    Mutation(
        "step with the LoRA inside, backward: down's gradient lands a row further",
        "csrc/cpu/loop/step_backward.cpp",
        "grads.down + (k - ch.rank) * ch.D",
        "grads.down + (k - ch.rank + 1) % ch.rank * ch.D",
        f"{_BUDGET} loop_lora_step",
    ),
    Mutation(
        "down-projection backward: a ragged block's last row is left out",
        "csrc/cpu/loop/down.cpp",
        "const int64_t last = blocks.end(b);",
        "const int64_t last = blocks.end(b) - (b + 1 == blocks.count);",
        f"{_PARTS} -k down_projection_gradients",
    ),
]
