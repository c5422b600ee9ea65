"""Checkpoints with every optimizer: training continues as if it had never stopped."""

import pytest
import torch

from openmythos.training import load_checkpoint, save_checkpoint
from tests.kit.bits import bits, same

OPTIMIZERS = {
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": dict(amsgrad=True),
    "AdamW": {},
    "Adamax": {},
    "ASGD": {},
    "LBFGS": {},
    "Muon": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": dict(momentum=0.9, centered=True),
    "Rprop": {},
    "SGD": dict(momentum=0.9),
}


def test_no_optimizer_is_left_out():
    classes = {c.__name__ for c in vars(torch.optim).values() if isinstance(c, type) and c is not torch.optim.Optimizer}
    assert classes - {"SparseAdam"} == set(OPTIMIZERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_exactly(build, tmp_path, name, dtype):
    def made(seed):
        model = build(seed).to(dtype)
        chosen = [p for p in model.parameters() if p.dim() == 2 or name != "Muon"]
        return model, getattr(torch.optim, name)(chosen, lr=1e-3, **OPTIMIZERS[name])

    def step(model, optimizer, seed):
        ids = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(seed))

        def closure():
            optimizer.zero_grad()
            loss = model(ids).float().logsumexp(-1).mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    model, optimizer = made(1)
    for seed in range(3):
        step(model, optimizer, seed)
    save_checkpoint(tmp_path / "a.pt", model, optimizer)
    other, second = made(2)
    load_checkpoint(tmp_path / "a.pt", other, second)
    for seed in range(3, 5):
        step(model, optimizer, seed)
        step(other, second, seed)
    assert same(bits(model), bits(other))


def test_optimizers_of_other_packages_keep_what_they_like(build, tmp_path):
    class Other(torch.optim.SGD):
        pass

    model = build(1)
    optimizer = Other(model.parameters(), lr=0.1)
    for p in model.parameters():
        optimizer.state[p] = {"exp_avg": torch.ones(3), "factor": [torch.ones(2), None], "step": torch.zeros(1)}
    save_checkpoint(tmp_path / "a.pt", model, optimizer)
    second = Other(model.parameters(), lr=0.1)
    load_checkpoint(tmp_path / "a.pt", model, second)
    assert second.state[model.embed.weight]["exp_avg"].tolist() == [1, 1, 1]
