"""A model on several ranks, by PyTorch's own means: DDP, FSDP2, and experts divided over ranks."""

from openmythos.parallel.gradients import accumulating, clip_grad_norm_, split_groups
from openmythos.parallel.initialize import initialize
from openmythos.parallel.plan import Plan
from openmythos.parallel.wrap import parallelize, unwrap

__all__ = ["Plan", "accumulating", "clip_grad_norm_", "initialize", "parallelize", "split_groups", "unwrap"]
