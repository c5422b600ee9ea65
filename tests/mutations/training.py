"""Faults in what a training step minimizes."""

from tests.mutations.mutation import Mutation

_LOSS, TESTS = "openmythos/training/head_loss.py", "tests/openmythos/training/test_head_loss.py"

MUTATIONS = [
    Mutation("head loss: a scaler does not reach the gradients", _LOSS, "else grad * x for", "else x for", TESTS),
    Mutation(
        "head loss: ignored targets pull at the first token",
        _LOSS,
        "of_target = -kept.to(logits.dtype)",
        "of_target = -torch.ones_like(logsumexp)",
        TESTS,
    ),
    Mutation(
        "head loss: the z-loss misses half of its gradient",
        _LOSS,
        "kept + 2 * z_weight * logsumexp",
        "kept + z_weight * logsumexp",
        TESTS,
    ),
    Mutation(
        "head loss: a hooked head is not called",
        _LOSS,
        "any(hooks) or any(GLOBAL_MODULE_HOOKS)",
        "any(GLOBAL_MODULE_HOOKS)",
        TESTS,
    ),
    Mutation(
        "head loss: a chunk's weight gradient replaces that of the chunks before",
        _LOSS,
        "d_weight += narrow.T @ part",
        "d_weight = (narrow.T @ part).to(d_weight.dtype)",
        TESTS,
    ),
]
