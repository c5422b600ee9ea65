"""Small faults in what the C++ code does for other processors, smaller teams, other threads and kept gradients."""

from tests.mutations.mutation import Mutation

_LINEAR = "tests/openmythos_kernels/ops/mla/test_linear.py"
_ROUTE = f"{_LINEAR} -k onednn"
_ALLOCATOR = "tests/openmythos_kernels/runtime/test_allocator.py"

MUTATIONS = [
    Mutation(
        "cpu products: oneDNN is used on every processor",
        "csrc/cpu/simd/gemm.cpp",
        "return asked && asked->typed<bool()>().call();",
        "return true;",
        _ROUTE,
    ),
    Mutation(
        "cpu products: OpenMP may shrink teams dynamically",
        "csrc/cpu/simd/gemm.cpp",
        "return !omp_get_dynamic() && omp",
        "return omp",
        _ROUTE,
    ),
    Mutation(
        "cpu products: the user's thread limit is ignored",
        "csrc/cpu/simd/gemm.cpp",
        " && threads <= omp_get_thread_limit()",
        "",
        _ROUTE,
    ),
    Mutation(
        "cpu products: the limit of active levels is ignored",
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
        "cpu moe_inference: the GIL is held during the whole layer",
        "csrc/cpu/moe/bindings.cpp",
        "      const pybind11::gil_scoped_release unlocked;\n",
        "",
        "tests/openmythos_kernels/nn/paths/test_moe_inference.py -k meanwhile",
    ),
    Mutation(
        "cpu masks: a row's last key is not checked",
        "csrc/cpu/mla/causal.cpp",
        "stride, S - seen)",
        "stride, S - seen - 1)",
        "tests/openmythos_kernels/ops/mla/test_is_causal.py",
    ),
    Mutation(
        "cpu masks: only the first matrix is checked",
        "csrc/cpu/mla/causal.cpp",
        "mask.size(d) > 1 && mask.stride(d) == 0",
        "mask.size(d) > 1",
        "tests/openmythos_kernels/ops/mla/test_is_causal.py",
    ),
    Mutation(
        "cpu allocator: a kept gradient keeps the memory of all",
        "csrc/cpu/runtime/allocator.cpp",
        "shared->discard_freed();",
        "(void)shared;",
        f"{_ALLOCATOR} -k keeps_one",
    ),
    Mutation(
        "cpu allocator: a neighbor's memory is returned while in use",
        "csrc/cpu/runtime/allocator.cpp",
        "while (end < parts.size() && parts[end].freed) ++end;",
        "while (end < parts.size() && (parts[end].freed || end > i)) ++end;",
        f"{_ALLOCATOR} -k keeps_one",
    ),
    Mutation(
        "cpu loop: only a row's last chunk counts for halting",
        "csrc/cpu/loop/step.cpp",
        "logits[r] = logits[r] + logit;",
        "logits[r] = logit;",
        "tests/openmythos_kernels/ops/test_specifications.py -k budget and loop_step",
    ),
]
