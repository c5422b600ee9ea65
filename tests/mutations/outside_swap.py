"""Small faults in what a swap recognizes, keeps and reports."""

from tests.mutations.mutation import Mutation

_DIGEST, _RECOGNISE = (f"openmythos_kernels/upstream/{name}.py" for name in ("digest", "recognise"))
_SWAP, _CAUSAL, _PLAIN = (
    "openmythos_kernels/swap.py",
    "openmythos_kernels/nn/causal.py",
    "openmythos_kernels/nn/guards.py",
)
_UPSTREAM = "tests/openmythos_kernels/upstream/test_recognise.py"
_MASKS = "tests/openmythos_kernels/nn/test_causal.py"

MUTATIONS = [
    Mutation(
        "digest: docstrings change the digest",
        _DIGEST,
        "return body[1:] if text else body",
        "return body",
        f"{_UPSTREAM} -k computes_nothing",
    ),
    Mutation(
        "digest: functions that a class uses do not change the digest",
        _DIGEST,
        "*sorted(map(_written, used_by(node, tree)))",
        "",
        f"{_UPSTREAM} -k changed_function",
    ),
    Mutation(
        "recognize: a replaced method is not noticed",
        _RECOGNISE,
        'if function is None or function.__code__ != source.code.get(f"{cls.__name__}.{name}"):',
        "if function is None:",
        f"{_UPSTREAM} -k what_runs",
    ),
    Mutation(
        "recognize: a replaced function of the module is not noticed",
        _RECOGNISE,
        "if name in own and (reason",
        "if name not in own and (reason",
        f"{_UPSTREAM} -k what_runs",
    ),
    Mutation(
        "swap: an open_mythos model calls a layer that was not swapped with our arguments",
        _SWAP,
        "if not issubclass(plans[inner].target, tuple(_OURS.values())):",
        "if False:",
        "tests/outside/test_forks.py",
    ),
    Mutation(
        "swap: the class that fully_shard created is lost",
        _SWAP,
        "module.__class__ = target if inner is cls else _around(cls, target)",
        "module.__class__ = target",
        "tests/openmythos_kernels/test_swap.py -k fully_shard",
    ),
    Mutation(
        "swap: no warning about modules that were not swapped",
        _SWAP,
        "    _warn_of_the_rest(model, plans)\n",
        "",
        "tests/openmythos_kernels/test_swap.py -k told",
    ),
    Mutation(
        "causal: a mask changed in place keeps its old answer",
        _CAUSAL,
        " or look.version != mask._version",
        "",
        f"{_MASKS} -k read_once",
    ),
    Mutation(
        "causal: a mask for another number of keys is recognized",
        _CAUSAL,
        "mask.shape[-2:] != (tokens, keys)",
        "mask.shape[-2] != tokens",
        _MASKS,
    ),
    Mutation(
        "guards: a weight that is not a plain tensor is read",
        _PLAIN,
        "if type(weight) in _NUMBERS and weight.dim() == dimensions:",
        "if weight is not None and weight.dim() == dimensions:",
        "tests/openmythos_kernels/nn/test_guards.py",
    ),
    Mutation(
        "guards: a method replaced on an instance is skipped",
        _PLAIN,
        'if method in state and not (called and method == "forward"):',
        'if method == "forward" and method in state and not called:',
        "tests/openmythos_kernels/nn/test_guards.py",
    ),
    Mutation(
        'experts: idle experts get gradients even with idle_experts="none"',
        "openmythos_kernels/nn/moe.py",
        'layers = [layer for layer in layers if layer.idle_experts == "zeros"]',
        "layers = list(layers)",
        "tests/openmythos_kernels/nn/test_moe.py",
    ),
]
