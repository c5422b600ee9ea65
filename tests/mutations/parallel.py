"""Small faults in models on several ranks, and in their checkpoints."""

from tests.mutations.mutation import Mutation

_EXCHANGE = "openmythos/parallel/exchange.py"
_CHECKPOINT = "openmythos/parallel/checkpoint.py"
_RANKS = "tests/openmythos/parallel/test_ranks.py -k"
_CHECKPOINTS = "tests/openmythos/parallel/test_checkpoint.py -k"
_PARALLELIZE = "tests/openmythos/parallel/test_parallelize.py -k"


MUTATIONS = [
    Mutation(
        "exchange: gradients of experts are sums over ranks",
        _EXCHANGE,
        "(topk_weights / route.ranks)",
        "topk_weights",
        f"{_RANKS} positions_have_halted",
    ),
    Mutation(
        "exchange: gradients of tokens are a mean over ranks",
        _EXCHANGE,
        "dflat * route.ranks",
        "dflat",
        f"{_RANKS} positions_have_halted",
    ),
    Mutation(
        "exchange: a rank that is done leaves",
        _EXCHANGE,
        "while self.layers[0].exchange.idle(self.layers[0].routed):",
        "while False:",
        f"{_RANKS} positions_have_halted",
    ),
    Mutation(
        "exchange: the second layer of a loop is not served",
        _EXCHANGE,
        "for layer in self.layers[1:]:",
        "for layer in ():",
        f"{_RANKS} two and layers",
    ),
    Mutation(
        "exchange: a round that others need gradients of is not recorded",
        _EXCHANGE,
        "return Round(sent, received, local, any(living), any(needing))",
        "return Round(sent, received, local, any(living), grad)",
        f"{_RANKS} truncated and gradients",
    ),
    Mutation(
        "exchange: idle rounds are not checkpointed",
        _EXCHANGE,
        "if not self.checkpoints:",
        "if True:",
        f"{_RANKS} checkpointed",
    ),
    Mutation(
        "parallelize: ranks wait for each other in the loop",
        "openmythos/parallel/wrap.py",
        "recurrent.ranks_may_part = True",
        "pass",
        f"{_RANKS} positions_have_halted",
    ),
    Mutation(
        "gradients: the norm is that of this rank's experts",
        "openmythos/parallel/gradients.py",
        "    if divided:\n",
        "    if False:\n",
        f"{_RANKS} twenty_steps",
    ),
    Mutation(
        "gradients: after an accumulating backward none reduces",
        "openmythos/parallel/gradients.py",
        "stack.callback(module.set_requires_gradient_sync, True, recurse=False)",
        "pass",
        f"{_PARALLELIZE} add_up",
    ),
    Mutation(
        "initialize: layers of one shape get the same weights",
        "openmythos/parallel/initialize.py",
        'with _generator_of(f"{seed}/{name}", device):',
        'with _generator_of(f"{seed}", device):',
        f"{_PARALLELIZE} follow_from_the_seed",
    ),
    Mutation(
        "initialize: every rank keeps the first shard",
        "openmythos/parallel/initialize.py",
        "p.to_local().copy_(mine.to_local())",
        "p.to_local().copy_(whole[: len(p.to_local())])",
        f"{_PARALLELIZE} depend_on_the_ranks",
    ),
    Mutation(
        "checkpoint: a thread writes weights that training changes",
        _CHECKPOINT,
        'x.to("cpu", copy=True) if',
        "x if",
        f"{_CHECKPOINTS} asynchronous",
    ),
    Mutation(
        "checkpoint: it has its name before it is complete",
        _CHECKPOINT,
        'part = folder / f".step-{step:08d}.{secrets.token_hex(8)}{_PART}"',
        'part = folder / f"step-{step:08d}"',
        f"{_CHECKPOINTS} full_disk or killed",
    ),
    Mutation(
        "checkpoint: the one that was saved twice is the newest",
        _CHECKPOINT,
        "return int(found[1]), int(found[2] or 0)",
        "return int(found[2] or 0), int(found[1])",
        f"{_CHECKPOINTS} last_n",
    ),
    Mutation(
        "checkpoint: an optimizer's settings are those of now",
        "openmythos/parallel/optimizer_state.py",
        "group.update(new)",
        "pass",
        f"{_CHECKPOINTS} settings",
    ),
    Mutation(
        "moe_exchanged: under checkpointing gradients are summed in place",
        "openmythos_kernels/nn/paths/moe_exchanged.py",
        "torch.is_grad_enabled() and not compat.saved_tensors_are_hooked()",
        "torch.is_grad_enabled()",
        "tests/openmythos_kernels/test_parallel.py -mslow -k checkpointed",
    ),
    Mutation(
        "counting: padding is forgotten",
        "openmythos/parallel/counting.py",
        "return -(-rows // shard) * (p.numel() // rows)",
        "return p.numel() // shard",
        "tests/openmythos/parallel/test_counting.py -k give_what_was_counted",
    ),
    Mutation(
        "rendezvous: a name that an earlier attempt left is believed",
        "openmythos/training/rendezvous.py",
        'if store.check([f"{name}/{mine}"]):',
        "if True:",
        "tests/openmythos/training/test_rendezvous.py -k not_believed",
    ),
    Mutation(
        "estimate: a prior on halting costs nothing",
        "openmythos/training/estimate.py",
        "predictions = loops if predicts_each else 1",
        "predictions = 1",
        "tests/openmythos/training/test_estimate.py -k pytorch_counts",
    ),
    Mutation(
        "files: a full disk has no reason",
        "openmythos/training/files.py",
        "raise before from None",
        "raise",
        "tests/openmythos/training/test_run.py -k full_disk",
    ),
]
