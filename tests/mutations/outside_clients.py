"""Small faults in how replaced parts are noticed, and in how this suite and the benchmarks run."""

from tests.mutations.mutation import Mutation

_PLAIN = "openmythos_kernels/nn/guards.py"
_PARTS = "tests/outside/test_replaced_parts.py -k"

MUTATIONS = [
    Mutation(
        "parts: a forward on an instance is skipped",
        _PLAIN,
        "    if reason := own_methods(name, part, kind):\n",
        "    if reason := '':\n",
        f"{_PARTS} own_forward-prelude.0.attn.kv_up",
    ),
    Mutation(
        "parts: a subclass is treated as its base class",
        _PLAIN,
        "if kind_of(part) is not kind:",
        "if not isinstance(part, kind):",
        f"{_PARTS} of_another_class-prelude.0.attn.wo",
    ),
    Mutation(
        "parts: hooks on an expert's linear layers are skipped",
        _PLAIN,
        "    for part_name, part in expert._modules.items():\n",
        "    for part_name, part in ():\n",
        f"{_PARTS} hooked-recurrent.block.ffn.routed_experts.1",
    ),
    Mutation(
        "suite: tests chosen by name start workers",
        "tests/kit/workers.py",
        "ArgsSource.TESTPATHS or option.keyword or",
        "ArgsSource.TESTPATHS or",
        "tests/kit/test_workers.py",
    ),
    Mutation(
        "benchmarks: the control starts from the reference's weights, unchanged",
        "benchmarks/suites/train.py",
        "torch.nextafter(p, torch.full_like(p, torch.inf))",
        "p",
        "tests/benchmarks/test_train.py",
    ),
    Mutation(
        "benchmarks: a run without time left still takes three rounds",
        "benchmarks/suites/depth.py",
        "share > LEAST * round_s",
        "share > round_s",
        "tests/benchmarks/test_depth.py",
    ),
]
