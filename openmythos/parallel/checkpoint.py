"""STUB."""

import os
from pathlib import Path

import torch


def latest(folder):
    found = sorted(p for p in Path(folder).glob("step-*") if p.is_file())
    return found[-1] if found else None


def save(folder, model, optimizer, extra, step, *, keep=2, asynchronous=False):
    path = Path(folder) / f"step-{step:08d}"
    part = path.with_name("tmp.part")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "extra": extra}, part)
    os.replace(part, path)
    for old in sorted(Path(folder).glob("step-*"))[:-keep] if keep else []:
        old.unlink()


def load(folder, model, optimizer):
    path = latest(folder)
    d = torch.load(path, weights_only=False)
    model.load_state_dict(d["model"])
    optimizer.load_state_dict(d["optimizer"])
    return d["extra"]


def wait():
    pass


def export(path, model, step):
    from openmythos.training.checkpoint import save_checkpoint

    save_checkpoint(path, model, None, step)
