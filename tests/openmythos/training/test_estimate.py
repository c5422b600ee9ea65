import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from openmythos.parallel.plan import Plan
from openmythos.sizes import build, measure
from openmythos.training.config import MemoryConfig, ModelConfig, TrainConfig, model_config
from openmythos.training.depth import DepthConfig
from openmythos.training.estimate import Flops, estimate, flops, measured_peak
from openmythos.training.losses import LossConfig, losses
from openmythos.training.optimizers import OptimizerConfig
from openmythos.variants import VARIANTS

SMALL = dict(
    vocab_size=64, dim=64, n_heads=4, n_kv_heads=2, max_seq_len=128, max_loop_iters=4, prelude_layers=1, coda_layers=1,
    kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_experts=8,
    n_shared_experts=1, n_experts_per_tok=2, expert_dim=64, lora_rank=4,
)  # fmt: skip
PRIOR = LossConfig(chunk=0, prior_weight=0.1)
NO_HALTING = ModelConfig(**SMALL, halting="off")


def config(**changes):
    changes = {"model": ModelConfig(**SMALL), "batch": 4, "tokens": 128, "depth": DepthConfig(mean=4), **changes}
    return TrainConfig(**changes)


def test_flops_of_the_parts_add_up_to_those_of_a_forward_pass():
    cfg = model_config(ModelConfig(**{**SMALL, "lora_rank": 0}))
    parts = flops(cfg, cfg.max_seq_len)
    assert parts.before + cfg.max_loop_iters * parts.loop + parts.after == pytest.approx(measure(cfg).flops)


def test_flops_of_a_dense_model_are_those_of_a_forward_pass():
    cfg = VARIANTS["dense_1_3b"]()
    assert flops(cfg, cfg.max_seq_len).training(1, None) == pytest.approx(3 * measure(cfg).flops)


def test_truncation_saves_the_backward_pass_of_early_loops():
    parts = Flops(before=6, loop=2, after=4)
    assert parts.training(8, None) == 3 * 10 + 3 * 8 * 2
    assert parts.training(8, 4) == 3 * 10 + 2 * 8 + 4 * 4
    assert parts.training(3, 4) == parts.training(3, None)
    assert parts.training(8, 4, predicts_each=True) == 3 * (6 + 8 * 4) + 2 * 8 + 4 * 4


@pytest.mark.parametrize("grad_loops", [None, 2])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("loss", [LossConfig(chunk=0), PRIOR], ids=["plain", "prior"])
def test_flops_of_a_step_are_those_that_pytorch_counts(loss, layers, grad_loops):
    """It counts attention over whole squares where it runs as products, which is little at 32 tokens."""
    cfg = model_config(ModelConfig(**{**SMALL, "coda_layers": layers}, halting="off"))
    inputs, targets = torch.randint(64, (2, 4, 32))
    with FlopCounterMode(display=False) as counter:
        losses(build(cfg), inputs, targets, loss, n_loops=4, grad_loops=grad_loops)[0].backward()
    expected = flops(cfg, 32).training(4, grad_loops, loss.predicts_each)
    assert counter.get_total_flops() / inputs.numel() == pytest.approx(expected, rel=0.08)


def test_a_prior_is_in_the_cost_of_a_run():
    plain, prior = (estimate(config(loss=loss, model=NO_HALTING)) for loss in (LossConfig(chunk=0), PRIOR))
    parts = flops(model_config(NO_HALTING), 128)
    assert prior.step_flops - plain.step_flops == pytest.approx(3 * 3 * parts.after * 4 * 128)
    assert prior.logits == 4 * plain.logits


@pytest.mark.parametrize("loss", [LossConfig(chunk=0), PRIOR], ids=["plain", "prior"])
@pytest.mark.parametrize("memory", [MemoryConfig(), MemoryConfig(checkpoint_loops=True)])
def test_activations_are_estimated_within_a_factor_of_two_of_what_a_step_keeps(memory, loss):
    asked = config(memory=memory, loss=loss, model=NO_HALTING if loss.predicts_each else ModelConfig(**SMALL))
    model, kept = build(model_config(asked.model)), {}
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def pack(x):
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x  # the tensor stays, so that its address does, too
        return x

    inputs, targets = torch.randint(64, (2, 4, 128))
    options = {"checkpoint_loops": True} if memory.checkpoint_loops else {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses(model, inputs, targets, loss, n_loops=4, **options)
    real = sum(x.untyped_storage().nbytes() for x in kept.values())
    cost = estimate(asked)
    assert 0.5 < (cost.activations + cost.logits / 2) / real < 2


def test_shards_and_divided_experts_divide_the_bytes():
    one, sharded, divided = (
        estimate(config(parallel=plan), ranks) for plan, ranks in ((Plan(), 1), (Plan(shard=4), 4), (Plan(expert=4), 4))
    )
    assert sharded.rank.parameters == pytest.approx(one.rank.parameters / 4, rel=0.05)
    assert one.rank.parameters > divided.rank.parameters > one.rank.parameters / 4
    assert sharded.rank.optimizer == 2 * sharded.rank.parameters


def test_muon_keeps_one_number_where_adamw_keeps_two():
    adamw, muon = (estimate(config(optimizer=OptimizerConfig(name=name))).rank.optimizer for name in ("adamw", "muon"))
    assert 0.5 * adamw < muon < 0.8 * adamw


@pytest.mark.parametrize("name", VARIANTS)
def test_every_named_size_is_estimated_without_allocating(name):
    kind = "dense" if name.startswith("dense") else "looped"
    asked = TrainConfig(model=ModelConfig(kind=kind, size=name), batch=64, tokens=2048, parallel=Plan(shard=8))
    cost = estimate(asked, ranks=64, peak=1e15)
    assert cost.parameters == measure(VARIANTS[name]()).parameters
    assert 0 < cost.rank.parameters < 4 * cost.parameters / 7 and cost.step_seconds > 0 and cost.sent > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_a_rate_measured_in_seconds(dtype):
    began = time.perf_counter()
    assert 1e8 < measured_peak(torch.device("cpu"), dtype) < 1e14
    assert time.perf_counter() - began < 5  # with products of one size: 20 s in bfloat16 on a processor with AVX2 alone
