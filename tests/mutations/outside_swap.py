"""Small faults in what a swap recognizes, keeps and reports."""

from tests.mutations.mutation import Mutation

MUTATIONS = [
    Mutation(
        "digest: docstrings change the digest",
        "openmythos_kernels/upstream/digest.py",
        "return body[1:] if text else body",
        "return body",
        "tests/openmythos_kernels/upstream/test_recognise.py -k computes_nothing",
    ),
    Mutation(
        "digest: functions that a class uses do not change the digest",
        "openmythos_kernels/upstream/digest.py",
        "*sorted(map(_written, used_by(node, tree)))",
        "",
        "tests/openmythos_kernels/upstream/test_recognise.py -k changed_function",
    ),
    Mutation(
        "recognize: a replaced method is not noticed",
        "openmythos_kernels/upstream/recognise.py",
        'if method and (function is None or function.__code__ != source.code.get(f"{cls.__name__}.{name}")):',
        "if method and function is None:",
        "tests/openmythos_kernels/upstream/test_recognise.py -k what_runs",
    ),
    Mutation(
        "recognize: a replaced function of the module is not noticed",
        "openmythos_kernels/upstream/recognise.py",
        "if name in own and (reason",
        "if name not in own and (reason",
        "tests/openmythos_kernels/upstream/test_recognise.py -k what_runs",
    ),
    Mutation(
        "swap: an open_mythos model calls a layer that was not swapped with our arguments",
        "openmythos_kernels/swap.py",
        "if not issubclass(plans[inner].target, tuple(_OURS.values())):",
        "if False:",
        "tests/outside/test_forks.py",
    ),
    Mutation(
        "swap: the class that fully_shard created is lost",
        "openmythos_kernels/swap.py",
        "module.__class__ = target if inner is cls else _around(cls, target)",
        "module.__class__ = target",
        "tests/openmythos_kernels/test_swap.py -k fully_shard",
    ),
    Mutation(
        "swap: no warning about modules that were not swapped",
        "openmythos_kernels/swap.py",
        "    _warn_of_the_rest(model, plans)\n",
        "",
        "tests/openmythos_kernels/test_swap.py -k told",
    ),
    Mutation(
        "causal: a mask changed in place keeps its old answer",
        "openmythos_kernels/nn/causal.py",
        " or look.version != mask._version",
        "",
        "tests/openmythos_kernels/nn/test_causal.py -k read_once",
    ),
    Mutation(
        "causal: a mask for another number of keys is recognized",
        "openmythos_kernels/nn/causal.py",
        "mask.shape[-2:] != (tokens, keys)",
        "mask.shape[-2] != tokens",
        "tests/openmythos_kernels/nn/test_causal.py",
    ),
    Mutation(
        "guards: a weight that is not a plain tensor is read",
        "openmythos_kernels/nn/guards.py",
        "if type(weight) in _NUMBERS and weight.dim() == dimensions:",
        "if weight is not None and weight.dim() == dimensions:",
        "tests/openmythos_kernels/nn/test_guards.py",
    ),
    Mutation(
        "guards: a method replaced on an instance is skipped",
        "openmythos_kernels/nn/guards.py",
        'if method in state and not (called and method == "forward"):',
        'if method == "forward" and method in state and not called:',
        "tests/openmythos_kernels/nn/test_guards.py",
    ),
    Mutation(
        'experts: idle experts get gradients even with idle_experts="none"',
        "openmythos_kernels/nn/paths/moe_repeated.py",
        'if layer.idle_experts != "zeros":',
        "if False:",
        "tests/openmythos_kernels/nn/test_moe.py",
    ),
]
