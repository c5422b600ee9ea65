import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from openmythos import MLAttention, stream
from openmythos.dropout import drops, without_dropout
from openmythos_kernels import accelerate
from tests.kit.tiny import tiny_model, tokens


def greedy(model, seed, new=8):
    return model.generate(tokens(1, 4, seed=seed), new, temperature=0)


def training_model(**fields):
    return tiny_model(dropout=0.5, **fields).train()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_overlapping_streams_drop_nothing_and_touch_no_flag(kind, fast):
    model = training_model(attn_type=kind)
    want = [greedy(tiny_model(attn_type=kind), seed) for seed in (1, 2)]
    model = accelerate(model) if fast else model
    model.coda.eval()
    flags = [module.training for module in model.modules()]
    first, second = (stream(model, tokens(1, 4, seed=s), n, temperature=0) for s, n in ((1, 8), (2, 3)))
    found, ffn = ([], []), model.recurrent.block.ffn
    for _ in range(3):
        load = ffn.expert_load
        found[0].append(next(first))
        found[1].append(next(second))
        assert ffn.expert_load is load  # generated tokens are not counted
        assert not torch.equal(model(tokens(1, 9)), model(tokens(1, 9)))  # the caller's own calls drop
        assert flags == [module.training for module in model.modules()]
    second.close()
    found[0].extend(first)
    assert flags == [module.training for module in model.modules()]
    for row, new in zip(want, found):
        assert row[0, 4 : 4 + len(new)].tolist() == torch.cat(new).tolist()
    assert ffn.expert_load.sum() > 0


@pytest.mark.parametrize("fast", [False, True])
def test_threads_generate_and_train_at_once(fast):
    model = training_model()
    want = [greedy(tiny_model(), seed) for seed in range(4)]
    model = accelerate(model) if fast else model
    wrong, trained = [], []

    def generate(seed):
        wrong.extend(i for i in range(4) if not torch.equal(greedy(model, seed), want[seed]))

    def train():
        trained.extend(torch.equal(model(tokens(2, 9)), model(tokens(2, 9))) for _ in range(8))

    threads = [threading.Thread(target=generate, args=(seed,)) for seed in range(4)] + [threading.Thread(target=train)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not any(trained) and all(module.training for module in model.modules())


def test_a_dropout_by_itself_switched_on():
    model = tiny_model(dropout=0.5)
    drop = model.recurrent.block.resid_drop
    assert not drops(drop)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert drops(drop) and not torch.equal(model(tokens(1, 9)), model(tokens(1, 9)))
    with without_dropout(model):
        assert not drops(drop)
    assert torch.equal(greedy(model, 1), greedy(tiny_model(), 1))  # generation drops nothing, as documented
    drop.p = 0.0
    assert not drops(drop)


class OwnDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class OwnAttention(MLAttention):
    def attend(self, q, k, v, mask):
        return F.dropout(super().attend(q, k, v, mask), 0.5, self.training)


def adapted(model):
    """The model with dropout that comes from elsewhere, in several ways."""
    block = model.prelude[0]
    block.attn.wo = nn.Sequential(block.attn.wo, nn.Dropout(0.5))
    block.resid_drop = OwnDropout()
    model.coda[0].attn.__class__ = OwnAttention
    model.coda[0].ffn = nn.Sequential(model.coda[0].ffn, nn.AlphaDropout(0.5))
    encoder = nn.TransformerEncoderLayer(24, 2, 16, dropout=0.5, batch_first=True)
    model.recurrent.block.ffn = nn.Sequential(model.recurrent.block.ffn, encoder)
    return model


def test_dropout_of_other_packages():
    torch.manual_seed(0)
    model = adapted(tiny_model()).eval()
    want = greedy(model, 1)
    assert len({tuple(greedy(model.train(), 1)[0].tolist()) for _ in range(4)} | {tuple(want[0].tolist())}) == 1


@pytest.mark.parametrize("place", ["attn.wo", "resid_drop", "ffn", "attn"])
def test_each_kind_of_foreign_dropout_is_seen(place):
    donor, model = adapted(tiny_model()), tiny_model()
    block = "coda.0" if place in ("ffn", "attn") else "prelude.0"
    model.set_submodule(f"{block}.{place}", donor.get_submodule(f"{block}.{place}"))
    want = greedy(model.eval(), 1)
    model.train()
    assert not torch.equal(model(tokens(1, 9)), model(tokens(1, 9)))
    assert all(torch.equal(greedy(model, 1), want) for _ in range(3))


def test_hooks_on_dropouts_still_run():
    model, seen = training_model(), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_: seen.append(1))
    want = greedy(tiny_model(), 1)
    assert torch.equal(greedy(model, 1), want) and seen


def test_compiled_parts_drop_nothing_while_generating():
    model = training_model()
    model.prelude[0].compile(backend="eager")
    model(tokens(1, 4))  # compiled with dropout
    assert torch.equal(greedy(model, 1, 3), greedy(tiny_model(), 1, 3))
    assert not torch.equal(model(tokens(1, 4)), model(tokens(1, 4)))


def test_no_mode_without_dropout():
    """With p = 0 no PyTorch call is intercepted, even in training mode."""
    model = tiny_model().train()
    with without_dropout(model):
        assert torch.overrides._len_torch_function_stack() == 0
    model.coda[0].resid_drop.p = 0.1
    off = without_dropout(model)
    for _ in range(2):
        with off:
            assert torch.overrides._len_torch_function_stack() == 1
        assert torch.overrides._len_torch_function_stack() == 0
