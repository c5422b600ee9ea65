"""Small faults in what a swap recognises, keeps and says."""

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
        "digest: docstrings count",
        _DIGEST,
        "return body[1:] if text else body",
        "return body",
        f"{_UPSTREAM} -k computes_nothing",
    ),
    Mutation(
        "digest: functions that a class uses do not count",
        _DIGEST,
        "*sorted(map(_written, used_by(node, tree)))",
        "",
        f"{_UPSTREAM} -k changed_function",
    ),
    Mutation(
        "recognise: a method that was replaced is not noticed",
        _RECOGNISE,
        'if method and (function is None or function.__code__ != source.code.get(f"{cls.__name__}.{name}")):',
        "if method and function is None:",
        f"{_UPSTREAM} -k what_runs",
    ),
    Mutation(
        "recognise: a function of the module that was replaced is not noticed",
        _RECOGNISE,
        "if name in own and (reason",
        "if name not in own and (reason",
        f"{_UPSTREAM} -k what_runs",
    ),
    Mutation(
        "swap: a model of open_mythos calls a layer that was left alone in our way",
        _SWAP,
        "if not issubclass(plans[inner].target, tuple(_OURS.values())):",
        "if False:",
        "tests/outside/test_forks.py",
    ),
    Mutation(
        "swap: what fully_shard put around a class is lost",
        _SWAP,
        "module.__class__ = target if inner is cls else _around(cls, target)",
        "module.__class__ = target",
        "tests/openmythos_kernels/test_swap.py -k fully_shard",
    ),
    Mutation(
        "swap: nobody is told of what was left alone",
        _SWAP,
        "    _warn_of_the_rest(model, plans)\n",
        "",
        "tests/openmythos_kernels/test_swap.py -k told",
    ),
    Mutation(
        "causal: a mask that was changed in place counts as it was",
        _CAUSAL,
        " or look.version != mask._version",
        "",
        f"{_MASKS} -k looked_at",
    ),
    Mutation(
        "causal: a mask of other keys counts",
        _CAUSAL,
        "mask.shape[-2:] != (tokens, keys)",
        "mask.shape[-2] != tokens",
        _MASKS,
    ),
    Mutation(
        "plain: a weight that is no plain tensor is read",
        _PLAIN,
        "if type(weight) in _NUMBERS and weight.dim() == dimensions:",
        "if weight is not None and weight.dim() == dimensions:",
        "tests/openmythos_kernels/nn/test_guards.py",
    ),
    Mutation(
        "plain: a method replaced on the object is skipped",
        _PLAIN,
        'if method in state and not (called and method == "forward"):',
        'if method == "forward" and method in state and not called:',
        "tests/openmythos_kernels/nn/test_guards.py",
    ),
    Mutation(
        "experts: idle ones have gradients whatever was asked for",
        "openmythos_kernels/nn/paths/moe_repeated.py",
        'if layer.idle_experts != "zeros":',
        "if False:",
        "tests/openmythos_kernels/nn/test_idle_experts.py",
    ),
]
