"""Small faults in the code that checks all other code: the budget, the check of an op, the kit."""

from tests.mutations.mutation import Mutation

_BUDGET = "openmythos_kernels/verify/budget.py"
_CHECK = "openmythos_kernels/verify/check.py"
_BUDGET_TESTS = "tests/openmythos_kernels/verify/test_budget.py"
_CHECK_TESTS = "tests/openmythos_kernels/verify/test_check.py"
_KIT = "tests/kit/memory.py"
_KIT_TESTS = "tests/kit/test_memory.py"
_TRAFFIC = "openmythos_kernels/verify/traffic.py"
_FAULTS = "tests/triton_on_cpu/test_faults.py"

MUTATIONS = [
    Mutation(
        "budget: eager's worst error counts for every element",
        _BUDGET,
        "mine, theirs = off.norm(), off_eager.norm()",
        "mine, theirs = off.norm(), off_eager.max() * off.numel()",
        _BUDGET_TESTS,
    ),
    Mutation(
        "budget: a single wrong element vanishes in the mean",
        _BUDGET,
        "if off.max() > factor",
        "if off.mean() > factor",
        _BUDGET_TESTS,
    ),
    Mutation("budget: wrong infinities pass", _BUDGET, "    if wrong.any():", "    if wrong.all():", _BUDGET_TESTS),
    Mutation(
        "budget: the wrong element is named", _BUDGET, "at = int(off.argmax())", "at = int(off.argmin())", _BUDGET_TESTS
    ),
    Mutation(
        "check: eager is compared with itself",
        _CHECK,
        "judge(specification, dtype, fast, drawn)",
        "judge(specification, dtype, [t.eager for t in drawn], drawn)",
        _CHECK_TESTS,
    ),
    Mutation(
        "check: the second run is the first",
        _CHECK,
        "again = run(specification.fast, given[0], specification.differentiable, drawn[0].grads)",
        "again = fast[0]",
        _CHECK_TESTS,
    ),
    Mutation(
        "check: the op never sees hostile inputs",
        _CHECK,
        "hostile = specification.hostile or (",
        "hostile = (",
        _CHECK_TESTS,
    ),
    Mutation(
        "check: the truth is not float64",
        _CHECK,
        "x.double() if isinstance(x, Tensor) and x.is_floating_point() else x",
        "x",
        _CHECK_TESTS,
    ),
    Mutation(
        "kit: guards compare memory with itself",
        _KIT,
        "self._memory.append((name, memory, memory.clone()))",
        "self._memory.append((name, memory, memory))",
        _KIT_TESTS,
    ),
    Mutation(
        "kit: new memory is not filled",
        _KIT,
        "torch.utils.deterministic.fill_uninitialized_memory = True",
        "torch.utils.deterministic.fill_uninitialized_memory = False",
        _KIT_TESTS,
    ),
    Mutation(
        "traffic: an access that begins inside an argument counts as inside",
        _TRAFFIC,
        "(offset + size > np.array(self._sizes)[slot])",
        "(offset > np.array(self._sizes)[slot])",
        f"{_FAULTS} -k out_of_bounds",
    ),
    Mutation(
        "traffic: other programs' reads are forgotten",
        _TRAFFIC,
        "np.where(known(read[offset]), me, -1)",
        "0",
        f"{_FAULTS} -k read_write_race",
    ),
    Mutation(
        "modes: every error of ptxsim counts as not checked",
        "tests/triton_on_cpu/modes.py",
        ' and "unsupported" in str(error)',
        "",
        f"{_FAULTS} -k own_result",
    ),
    Mutation(
        "modes: a dead process is ignored",
        "tests/triton_on_cpu/plugin.py",
        "    for item in died:",
        "    for item in died[1:]:",
        f"{_FAULTS} -k own_result",
    ),
]
