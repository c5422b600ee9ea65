"""Small faults in the Triton kernels of the mixture of experts."""

from tests.mutations.mutation import Mutation

_KERNELS = "openmythos_kernels/ops/moe/kernels"
_TESTS = "tests/triton_on_cpu/test_specifications.py -k interpreter-moe"

MUTATIONS = [
    Mutation(
        "moe sort: a pair counts itself among those before it",
        f"{_KERNELS}/sort.py",
        "(i[None, :] < i[:, None])",
        "(i[None, :] <= i[:, None])",
        f"{_TESTS}_sort",
    ),
    Mutation(
        "moe route: the expert is read back from the wrong end",
        f"{_KERNELS}/route.py",
        "(E_BLOCK - 1 - e)[None, :].to(tl.int64)",
        "e[None, :].to(tl.int64)",
        f"{_TESTS}_route",
    ),
    Mutation(
        "moe combine: rows that belong to no expert are summed",
        f"{_KERNELS}/experts.py",
        "valid = at < end",
        "valid = at >= 0",
        "tests/openmythos_kernels/ops/moe/test_kernels.py -k indices_outside",
    ),
    Mutation(
        "moe backward: the slope of silu misses a term",
        f"{_KERNELS}/tiles.py",
        "(sigmoid + s * (1.0 - sigmoid))",
        "sigmoid",
        f"{_TESTS}_experts",
    ),
    Mutation(
        "moe weights: an expert's first row is left out",
        f"{_KERNELS}/experts_weights.py",
        "first = tl.load(offsets + e)",
        "first = tl.load(offsets + e) + 1",
        f"{_TESTS}_experts",
    ),
    Mutation(
        "moe gather: a pair's token is another's", f"{_KERNELS}/tiles.py", "// K", "// (K + 1)", f"{_TESTS}_experts"
    ),
    Mutation(
        "moe weights: copies of strided matrices die before the kernels that read them",
        "openmythos_kernels/ops/moe/launch/weights.py",
        "self.matrices.append(dense)",
        "self.matrices.append(weights)",
        "tests/triton_on_cpu/test_specifications.py -k layouts and moe_experts and strided",
    ),
    Mutation(
        "moe weights: distances are 32-bit numbers",
        f"{_KERNELS}/tiles.py",
        "offset = tl.load(offsets + e)",
        "offset = tl.load(offsets + e).to(tl.int32).to(tl.int64)",
        "tests/openmythos_kernels/ops/moe/test_kernels.py -k further",
    ),
    Mutation(
        "weights: an earlier call's gradients are overwritten",
        "openmythos_kernels/ops/moe/kernels/experts_weights.py",
        "    if ADD:\n        value +=",
        "    if False:\n        value +=",
        "tests/triton_on_cpu/test_specifications.py -k interpreter-moe_experts_backward_add-float32-several",
    ),
    Mutation(
        "weights once: every call reads the rows of the first",
        "openmythos_kernels/ops/moe/kernels/experts_weights_once.py",
        "before = tl.load(starts + call)",
        "before = tl.load(starts)",
        "tests/triton_on_cpu/test_once.py -k lengths",
    ),
    Mutation(
        "weights once: the second call's gradients of shared experts replace the first's",
        "openmythos_kernels/ops/moe/once.py",
        "first, again = sum(self._tokens), bool(self._tokens)",
        "first, again = sum(self._tokens), False",
        "tests/triton_on_cpu/test_once.py -k lengths",
    ),
    Mutation(
        "shared experts by the library: the last one's output instead of the sum",
        "openmythos_kernels/ops/moe/launch/dense.py",
        "else y.addmm_(act, down.t())",
        "else torch.mm(act, down.t())",
        "tests/triton_on_cpu/test_specifications.py -k interpreter-moe_experts-float32-tiles",
    ),
    Mutation(
        "places: 32 bits for every matrix",
        "openmythos_kernels/ops/moe/kernels/tiles.py",
        "if rows * columns >= 2147483648:",
        "if False:",
        "tests/triton_on_cpu/test_large_matrices.py",
    ),
    Mutation(
        "norm: the gradient of its scale is dropped",
        "openmythos_kernels/ops/norm/kernels/rms_norm.py",
        "(grad - unit * (tl.sum(grad * unit, 0) / D)) * rstd",
        "grad * rstd",
        "tests/triton_on_cpu/test_specifications.py -k interpreter-rms_norm-float32-sum",
    ),
    Mutation(
        "dense layer: one weight is padded at the wrong end",
        "openmythos_kernels/ops/moe/launch/ffn.py",
        "F.pad(down, (0, more))",
        "F.pad(down, (more, 0))",
        "tests/triton_on_cpu/test_specifications.py -k interpreter-swiglu",
    ),
]
