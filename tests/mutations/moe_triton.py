"""Small faults in the Triton kernels of the mixture of experts."""

from tests.mutations.mutation import Mutation

_KERNELS = "openmythos_kernels/ops/moe/kernels"
_TESTS = "tests/openmythos_kernels/ops/test_moe_triton.py"

MUTATIONS = [
    Mutation(
        "moe sort: a pair counts itself among those before it",
        f"{_KERNELS}/sort.py", "(i[None, :] < i[:, None])", "(i[None, :] <= i[:, None])", _TESTS,
    ),
    Mutation(
        "moe route: the expert is read back from the wrong end",
        f"{_KERNELS}/route.py", "(E_BLOCK - 1 - e)[None, :].to(tl.int64)", "e[None, :].to(tl.int64)", _TESTS,
    ),
    Mutation(
        "moe combine: rows that belong to no expert are summed",
        f"{_KERNELS}/experts.py", "valid = at < end", "valid = at >= 0", _TESTS,
    ),
    Mutation(
        "moe backward: the slope of silu misses a term",
        f"{_KERNELS}/experts_backward.py", "(sigmoid + s * (1.0 - sigmoid))", "sigmoid", _TESTS,
    ),
    Mutation(
        "moe weights: an expert's first row is left out",
        f"{_KERNELS}/experts_weights.py", "first = tl.load(offsets + e)", "first = tl.load(offsets + e) + 1", _TESTS,
    ),
    Mutation(
        "moe gather: a pair's token is another's",
        f"{_KERNELS}/tiles.py", "// K", "// (K + 1)", _TESTS,
    ),
]  # fmt: skip
