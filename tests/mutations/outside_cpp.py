"""Small faults in what other processors, smaller teams, other threads and kept gradients ask of the C++ code."""

from tests.mutations.mutation import Mutation

_LINEAR = "tests/openmythos_kernels/ops/test_mla_linear.py"
_ROUTE = f"{_LINEAR} -k onednn"
_PAGES = "tests/openmythos_kernels/runtime/test_allocator.py"

MUTATIONS = [
    Mutation(
        "cpu products: nobody asks whether oneDNN multiplies on this processor",
        "csrc/cpu/simd/gemm.cpp",
        "return asked && asked->typed<bool()>().call();",
        "return true;",
        _ROUTE,
    ),
    Mutation(
        "cpu products: teams may be smaller at the runtime's wish",
        "csrc/cpu/simd/gemm.cpp",
        "return !omp_get_dynamic() && omp",
        "return omp",
        _ROUTE,
    ),
    Mutation(
        "cpu products: teams may be smaller at the user's wish",
        "csrc/cpu/simd/gemm.cpp",
        " && threads <= omp_get_thread_limit()",
        "",
        _ROUTE,
    ),
    Mutation(
        "cpu products: regions may be inactive",
        "csrc/cpu/simd/gemm.cpp",
        " && omp_get_max_active_levels() > omp_get_active_level()",
        "",
        _ROUTE,
    ),
    Mutation(
        "cpu products: oneDNN may round float32",
        "csrc/cpu/simd/gemm.cpp",
        "runs_here() && !rounds()",
        "runs_here()",
        _ROUTE,
    ),
    Mutation(
        "cpu experts: a layer without gradients stops every other thread of Python",
        "csrc/cpu/moe/bindings.cpp",
        "      const pybind11::gil_scoped_release unlocked;\n",
        "",
        "tests/openmythos_kernels/nn/paths/test_moe_inference.py -k meanwhile",
    ),
    Mutation(
        "cpu masks: a row's last key is not looked at",
        "csrc/cpu/mla/causal.cpp",
        "stride, S - seen)",
        "stride, S - seen - 1)",
        "tests/openmythos_kernels/ops/test_causal.py",
    ),
    Mutation(
        "cpu masks: the first matrix stands for all",
        "csrc/cpu/mla/causal.cpp",
        "mask.size(d) > 1 && mask.stride(d) == 0",
        "mask.size(d) > 1",
        "tests/openmythos_kernels/ops/test_causal.py",
    ),
    Mutation(
        "cpu gradients: who keeps one keeps the memory of all",
        "csrc/cpu/runtime/allocator.cpp",
        "shared->forget_gone();",
        "(void)shared;",
        f"{_PAGES} -k keeps_one",
    ),
    Mutation(
        "cpu gradients: what a neighbour still has is given up too",
        "csrc/cpu/runtime/allocator.cpp",
        "while (end < parts.size() && parts[end].gone) ++end;",
        "while (end < parts.size() && (parts[end].gone || end > i)) ++end;",
        f"{_PAGES} -k keeps_one",
    ),
    Mutation(
        "cpu loop: of a row's chunks the last alone counts for halting",
        "csrc/cpu/loop/step.cpp",
        "logits[r] = logits[r] + logit;",
        "logits[r] = logit;",
        "tests/openmythos_kernels/ops/test_specifications.py -k budget and loop_step",
    ),
]
