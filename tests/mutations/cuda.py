"""Small faults in the CUDA kernels, their bindings, compaction and the exit counter."""

from tests.mutations.mutation import Mutation

_KERNELS = "tests/cuda_on_cpu/test_kernels.py"
_COMPACTION = "tests/openmythos_kernels/ops/loop/test_compaction.py"

MUTATIONS = [
    Mutation(
        "cuda step: the LoRA delta of one rank is left out",
        "csrc/cuda/loop_step.cu",
        "for (int k = 0; k < rank; k += kLoads)",
        "for (int k = 1; k < rank; k += kLoads)",
        f"{_KERNELS} -k test_step_shapes",
    ),
    Mutation(
        "cuda step: the last row of an odd number is computed but not stored",
        "csrc/cuda/loop_step.cu",
        "if (first + r >= N) continue;",
        "if (first + r + 1 >= N) continue;",
        f"{_KERNELS} -k test_step_shapes",
    ),
    Mutation(
        "cuda step: the sum of squares misses one warp",
        "csrc/cuda/loop_step.cu",
        "for (int w = 0; w < team_warps(); ++w)",
        "for (int w = 0; w < team_warps() - 1; ++w)",
        f"{_KERNELS} -k test_step_slice",
    ),
    Mutation(
        "cuda step: the threshold is never reached",
        "csrc/cuda/loop_step.cu",
        "loop, threshold, spend_remainder);",
        "loop, acc_t<T>(2), spend_remainder);",
        f"{_KERNELS} -k test_step_halting",
    ),
    Mutation(
        "cuda step: a missing barrier",
        "csrc/cuda/loop_step.cu",
        "    team_sync();\n    if (lane < R)",
        "    if (lane < R)",
        f"{_KERNELS} -k test_step_slice",
    ),
    Mutation(
        "cuda step: misaligned rows are read as vectors",
        "csrc/cuda/pack.cuh",
        "% 16 != 0) return false",
        "% 16 != 0) return true",
        "tests/cuda_on_cpu/test_sanitizers.py -mslow -k asan",
    ),
    Mutation(
        "cuda backward: the norm's second term is dropped",
        "csrc/cuda/loop_step_backward.cu",
        "into_e = fused(s.shrink, entering, scaled * norm[i]);",
        "into_e = scaled * norm[i];",
        f"{_KERNELS} -k test_step_shapes",
    ),
    Mutation(
        "cuda backward: whole packs read past the end of the embedding",
        "csrc/cuda/loop_step_backward.cu",
        "return d < embedded ? parameter(",
        "return d >= 0 ? parameter(",
        f"{_KERNELS} -k whole_packs",
    ),
    Mutation(
        "cuda backward: a run of slabs is not added",
        "csrc/cuda/parameter_gradients.cuh",
        "for (int g = 1; g < kReduceGroups; ++g)",
        "for (int g = 2; g < kReduceGroups; ++g)",
        f"{_KERNELS} -k test_step_shapes",
    ),
    Mutation(
        "cuda backward: long rows forget all but the first warp's sums",
        "csrc/cuda/loop_step_backward.cu",
        "on_weight += partial[w][0];",
        "on_weight += w ? 0 : partial[w][0];",
        f"{_KERNELS} -k longer_than_a_team",
    ),
    Mutation(
        "cuda bindings: the gradients of h_out and u are swapped",
        "csrc/cuda/bindings_loop.cpp",
        "data_or_null(grads.h_out), data_or_null(grads.u)",
        "data_or_null(grads.u), data_or_null(grads.h_out)",
        f"{_KERNELS} -k test_step_shapes",
    ),
    Mutation(
        "cuda compaction: every tile writes from the start",
        "csrc/cuda/compaction.cu",
        "index[tiles[blockIdx.x] + rank] = i",
        "index[rank] = i",
        f"{_KERNELS} -k test_compaction_slice",
    ),
    Mutation(
        "cuda gather: a negative row index is read",
        "csrc/cuda/rows.cu",
        "from >= 0 && from < rows",
        "from < rows",
        "tests/cuda_on_cpu/test_sanitizers.py -mslow -k asan",
    ),
    Mutation(
        "exit counter: it answers about the newest record",
        "openmythos_kernels/ops/loop/exit.py",
        "self._slots[(self._records - 1 - self.lag)",
        "self._slots[(self._records - 1)",
        "tests/openmythos_kernels/ops/loop/test_exit.py",
    ),
    Mutation(
        "scatter: the gradient of base includes the replaced rows",
        "openmythos_kernels/ops/loop/compaction.py",
        "dbase = SCATTER_ROWS(grad, None, index, grad.shape[0]) if base",
        "dbase = grad if base",
        f"{_COMPACTION} -k gradients",
    ),
]
