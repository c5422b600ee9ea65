"""Small faults in losses over all loops: trajectories, PonderNet's prior, balanced experts, the fitted head."""

from tests.mutations.mutation import Mutation

TRAJECTORY, PRIOR = "tests/openmythos/test_trajectory.py", "tests/openmythos/training/test_prior.py"
BALANCE, HEAD = "tests/openmythos/test_balance.py", "tests/openmythos/training/test_halting_head.py"

MUTATIONS = [
    Mutation(
        "trajectory: states keep gradients where a sequence's are cut",
        "openmythos/loop.py",
        """                if torch.is_grad_enabled() and t < max(starts):
                    x = _detached(x, torch.tensor([t < start for start in starts], device=h.device))
                if self.recorder is not None:
                    self.recorder.add(x.h, self.sequences())
""",
        """                if self.recorder is not None:
                    self.recorder.add(x.h, self.sequences())
                if torch.is_grad_enabled() and t < max(starts):
                    x = _detached(x, torch.tensor([t < start for start in starts], device=h.device))
""",
        TRAJECTORY,
    ),
    Mutation(
        "trajectory: a shrinking batch forgets who is left",
        "openmythos_kernels/nn/paths/early_exit.py",
        "return self.rows[:0] if self.idle else self.rows",
        "return self.rows[:0] if self.idle else torch.arange(len(self.rows))",
        TRAJECTORY,
    ),
    Mutation(
        "trajectory: ACT halts all the same",
        "openmythos/recurrence.py",
        "(False, None, None) if return_trajectory else self.halting(h, exit)",
        "self.halting(h, exit)",
        TRAJECTORY,
    ),
    Mutation(
        "trajectory: sequences that start elsewhere share their angles",
        "openmythos/model.py",
        "freqs_cis = freqs_cis[seen.sequence] if freqs_cis.dim() == 3 else freqs_cis",
        "freqs_cis = freqs_cis[seen.sequence * 0] if freqs_cis.dim() == 3 else freqs_cis",
        TRAJECTORY,
    ),
    Mutation(
        "PonderNet: the last loop takes its own probability, not what is left",
        "openmythos/training/prior.py",
        "p = torch.where(last, 1.0, torch.where(here, p, 0.0))",
        "p = torch.where(here, p, 0.0)",
        PRIOR,
    ),
    Mutation(
        "PonderNet: the prior knows no last loop",
        "openmythos/training/prior.py",
        'float("-inf")).log_softmax(0)',
        'float("-inf"))',
        PRIOR,
    ),
    Mutation(
        "PonderNet: an impossible loop has an infinite gradient",
        "openmythos/training/prior.py",
        "p.clamp_min(torch.finfo(p.dtype).tiny).log()",
        "torch.where(p > 0, p.log(), 0.0)",
        PRIOR,
    ),
    Mutation(
        "PonderNet: every loop has the targets of the first sequences",
        "openmythos/training/losses.py",
        "targets[seen.sequence], loss.chunk",
        "targets[seen.sequence.sort().values], loss.chunk",
        PRIOR,
    ),
    Mutation(
        "DDP: ranks do not average the halting layer that the loss reads",
        "openmythos/training/run.py",
        "trains_halting = config.loss.prior_weight > 0",
        "trains_halting = False",
        "tests/openmythos/training/test_run_ranks.py -k same_terms",
    ),
    Mutation(
        "exchange: only the first output waits for the last round",
        "openmythos/parallel/exchange.py",
        "Tied.apply(x, token) if x.requires_grad else x for x in output",
        "Tied.apply(x, token) if i == 0 else x for i, x in enumerate(output)",
        "tests/openmythos/training/test_run_ranks.py -k same_terms",
    ),
    Mutation(
        "balance: loops without gradients pull at the router",
        "openmythos/balance.py",
        "logits.requires_grad and not all(self._graded)",
        "False",
        BALANCE,
    ),
    Mutation(
        "balance: the chosen experts ignore the bias of the router",
        "openmythos_kernels/nn/paths/moe_experts.py",
        "layer.scores.add(layer, logits, expert_idx)",
        "layer.scores.add(layer, logits, logits.topk(layer.topk).indices)",
        BALANCE,
    ),
    Mutation(
        "balance: what has halted leaves the batch",
        "openmythos_kernels/nn/paths/early_exit.py",
        "and trim and not self.whole",
        "and trim",
        BALANCE,
    ),
    Mutation(
        "balance: the reference stops once all have halted",
        "openmythos/recurrence.py",
        "may_stop and self.scores is None and",
        "may_stop and",
        BALANCE,
    ),
    Mutation(
        "halting head: a prediction that comes and goes counts as final",
        "openmythos/training/halting_head.py",
        ".int().flip(0).cummin(0).values.flip(0).bool()",
        "",
        HEAD,
    ),
    Mutation(
        "halting head: the bias forgets the mean of the states",
        "openmythos/training/halting_head.py",
        "halt.bias.copy_(bias - (weight / scale * mean).sum())",
        "halt.bias.copy_(bias)",
        HEAD,
    ),
]
