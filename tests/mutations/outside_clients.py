"""Small faults that foreign clients meet: parts replaced in ways an op cannot see, and in how this suite and the
benchmarks run."""

from tests.mutations.mutation import Mutation

_PLAIN = "openmythos_kernels/nn/guards.py"
_PARTS = "tests/outside/test_replaced_parts.py -k"

MUTATIONS = [
    Mutation(
        "parts: a forward of somebody's own on a part is passed over",
        _PLAIN,
        "    if reason := own_methods(name, part, kind):\n",
        "    if reason := '':\n",
        f"{_PARTS} own_forward-prelude.0.attn.kv_up",
    ),
    Mutation(
        "parts: a subclass is read as its base",
        _PLAIN,
        "if kind_of(part) is not kind:",
        "if not isinstance(part, kind):",
        f"{_PARTS} of_another_class-prelude.0.attn.wo",
    ),
    Mutation(
        "parts: hooks on an expert's linear maps are passed over",
        _PLAIN,
        "    for part_name, part in expert._modules.items():\n",
        "    for part_name, part in ():\n",
        f"{_PARTS} hooked-recurrent.block.ffn.routed_experts.1",
    ),
    Mutation(
        "suite: a test chosen by its name waits for workers",
        "tests/kit/workers.py",
        "ArgsSource.TESTPATHS or option.keyword or",
        "ArgsSource.TESTPATHS or",
        "tests/kit/test_workers.py",
    ),
    Mutation(
        "benchmarks: the control is trained from the reference's own weights",
        "benchmarks/suites/train.py",
        "torch.nextafter(p, torch.full_like(p, torch.inf))",
        "p",
        "tests/benchmarks/test_train.py",
    ),
    Mutation(
        "benchmarks: a late run goes on taking three rounds",
        "benchmarks/suites/depth.py",
        "share > LEAST * round_s",
        "share > round_s",
        "tests/benchmarks/test_depth.py",
    ),
]
