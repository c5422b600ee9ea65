import copy
import io
import pickle

import pytest
import torch

from openmythos import DenseConfig, DenseTransformer, OpenMythos
from openmythos.block import BlockStack
from openmythos.layers import Expert, rotary_table
from tests.kit.tiny import relative, tiny_config, tiny_model, tokens

KINDS = ["mla", "gqa"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_other_precisions(kind, dtype, close):
    model = tiny_model(attn_type=kind, act_threshold=1.0)
    ids = tokens(2, 7)
    expected = model(ids)
    expected.logsumexp(-1).mean().backward()
    grads = [p.grad for p in model.parameters()]
    other = copy.deepcopy(model).to(dtype)
    other.zero_grad()
    logits = other(ids)
    assert logits.dtype == dtype and relative(logits, expected) < close
    logits.logsumexp(-1).mean().backward()
    whole = torch.cat([g.flatten() for g in grads])
    assert relative(torch.cat([p.grad.double().flatten() for p in other.parameters()]), whole) < 2 * close
    cache = {}
    with torch.no_grad():
        steps = [other(ids[:, t : t + 1], kv_cache=cache, start_pos=t) for t in range(7)]
    assert relative(torch.cat(steps, 1), logits) < close
    assert all(t.dtype == dtype for entry in cache.values() for t in entry.tensors.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("halting", ["evolve", "freeze", "off"])
def test_autocast(kind, halting):
    model = tiny_model(attn_type=kind, halting=halting)
    ids = tokens(2, 7)
    expected = model(ids)
    cache = {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
        logits.float().logsumexp(-1).mean().backward()
        with torch.no_grad():
            steps = [model(ids[:, t : t + 1], kv_cache=cache, start_pos=t) for t in range(7)]
    assert relative(logits, expected) < 0.1 and relative(torch.cat(steps, 1), logits) < 0.1
    assert all(p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("fields", [dict(core_layers=3), dict(core_ffn="dense"), dict(core_layers=2, core_ffn="dense"), dict(ffn_dim=3),
                                    dict(lora_rank=0), dict(prelude_layers=0, coda_layers=0), dict(max_seq_len=1)])  # fmt: skip
def test_shapes_of_the_tree(fields):
    model = tiny_model(**fields)
    cfg = model.cfg
    ids = tokens(2, min(6, cfg.max_seq_len))
    logits = model(ids)
    logits.logsumexp(-1).mean().backward()
    assert logits.shape == (*ids.shape, 37)
    assert all(p.grad is not None for p in model.parameters())
    core = list(model.recurrent.block) if isinstance(model.recurrent.block, BlockStack) else [model.recurrent.block]
    assert len(core) == cfg.core_layers
    assert all(isinstance(block.ffn, Expert) == (cfg.core_ffn == "dense") for block in core)
    assert (model.recurrent.lora is None) == (cfg.lora_rank == 0)
    cache = {}
    steps = [model(ids[:, t : t + 1], kv_cache=cache, start_pos=t) for t in range(ids.shape[1])]
    assert relative(torch.cat(steps, 1), logits) < 1e-5
    assert len(cache) == cfg.prelude_layers + cfg.coda_layers + cfg.max_loop_iters * cfg.core_layers


def test_a_stack_is_its_blocks_one_after_another():
    model = tiny_model(core_layers=2)
    x, freqs = torch.randn(1, 4, 24), model.freqs_cis_mla[:4]
    first, second = model.recurrent.block
    assert torch.equal(model.recurrent.block(x, freqs), second(first(x, freqs), freqs))


@pytest.mark.parametrize("kind", KINDS)
def test_causal_and_independent_of_the_batch(kind):
    model = tiny_model(attn_type=kind)
    ids = tokens(3, 8)
    logits = model(ids)
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 37
    for start in (0, 3, [0, 4, 2]):
        assert relative(model(changed, start_pos=start)[:, :5], model(ids, start_pos=start)[:, :5]) < 1e-6
    assert relative(model(ids[1:2]), logits[1:2]) < 1e-5
    assert torch.equal(model(ids), logits)


def test_logits_at():
    model = tiny_model()
    ids = tokens(3, 5)
    at = torch.tensor([4, 0, 2])
    assert relative(model(ids, logits_at=at)[:, 0], model(ids)[torch.arange(3), at]) < 1e-6


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to("cpu")])
def test_copies(clone):
    model = tiny_model()
    ids = tokens(2, 5)
    other = clone(model)
    assert torch.equal(other(ids), model(ids))
    assert other.head.weight is other.embed.weight
    assert list(other.state_dict()) == list(model.state_dict())


def test_saving_and_loading():
    model = tiny_model()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = OpenMythos(tiny_config()).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(tokens(2, 5)), model(tokens(2, 5)))


@pytest.mark.parametrize("make", [lambda: OpenMythos(tiny_config()), lambda: DenseTransformer(DenseConfig(vocab_size=37, dim=24, n_heads=2, n_layers=1))])
@pytest.mark.parametrize("assign", [False, True])
def test_through_the_meta_device(make, assign):
    model = make()
    with torch.device("meta"):
        other = make()
    assert other.freqs_cis.is_meta
    if not assign:
        other.to_empty(device="cpu")
        assert torch.equal(other.freqs_cis, model.freqs_cis) and torch.equal(other.freqs_cis_mla, model.freqs_cis_mla)
    other.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(other.freqs_cis, model.freqs_cis)
    assert other.head.weight is other.embed.weight
    assert torch.equal(other(tokens(1, 5)), model(tokens(1, 5)))
    there_and_back = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    assert torch.equal(there_and_back.freqs_cis_mla, model.freqs_cis_mla)
    assert there_and_back.head.weight is there_and_back.embed.weight


def test_tables_belong_to_their_attention():
    model = OpenMythos(tiny_config())
    assert torch.equal(model.freqs_cis, rotary_table(12, 24, 500000.0))
    assert torch.equal(model.freqs_cis_mla, rotary_table(4, 24, 500000.0))


@pytest.mark.parametrize(
    "ids, options, message",
    [
        (tokens(4), {}, r"input_ids: torch.int64 of shape \(4,\): must be int64 or int32 \(B, T\), not empty"),
        (tokens(2, 0), {}, r"input_ids: .*\(2, 0\)"),
        (tokens(0, 2), {}, r"input_ids: .*\(0, 2\)"),
        (tokens(1, 4).float(), {}, "input_ids: torch.float32"),
        (tokens(1, 4).bool(), {}, "input_ids: torch.bool"),
        (tokens(1, 4).to("meta"), {}, "input_ids is on meta, the model on cpu"),
        (torch.tensor([[3, 37]]), {}, "input_ids: found 3 .. 37: must be in 0 .. 36"),
        (torch.tensor([[-1, 3]]), {}, "input_ids: found -1 .. 3"),
        (tokens(1, 25), {}, "input_ids: 25 tokens from position 0 end past max_seq_len = 24"),
        (tokens(1, 4), dict(start_pos=21), "input_ids: 4 tokens from position 21 end past max_seq_len = 24"),
        (tokens(2, 4), dict(start_pos=[0, 21]), "4 tokens from position 21"),
        (tokens(2, 4), dict(start_pos=-1), "start_pos = -1: must be an integer >= 0, or one per row"),
        (tokens(2, 4), dict(start_pos=[0]), r"start_pos = \[0\]"),
        (tokens(2, 4), dict(start_pos=[0, 1.5]), r"start_pos = \[0, 1.5\]"),
        (tokens(2, 4), dict(start_pos=torch.tensor(1.0)), "start_pos = tensor"),
        (tokens(2, 4), dict(start_pos=None), "start_pos = None"),
        (tokens(2, 4), dict(start_pos="01"), "start_pos = '01'"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_bad_inputs(ids, options, message, cached):
    cache = {} if cached else None
    with pytest.raises(ValueError, match=message):
        tiny_model()(ids, kv_cache=cache, **options)
    assert not cache


def test_int32_ids():
    model = tiny_model()
    assert torch.equal(model(tokens(2, 5).int()), model(tokens(2, 5)))


def test_dropout_only_while_training():
    model = tiny_model(dropout=0.3)
    ids = tokens(2, 5)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
