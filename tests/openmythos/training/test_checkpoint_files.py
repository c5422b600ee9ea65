"""Checkpoints as files: concurrent writers, links, file modes, and several dtypes in one file."""

import os
import threading

import pytest
import torch

from openmythos.training import load_checkpoint, load_model, save_checkpoint
from tests.kit.bits import bits, same

SUFFIXES = ["pt", "safetensors"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_weights_of_several_dtypes_come_back_in_theirs(build, tmp_path, suffix):
    model, path = build(1).to(torch.bfloat16), tmp_path / f"mixed.{suffix}"
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data = torch.randn(p.shape)
    model.recurrent.block.ffn.router_bias += 1e-3
    save_checkpoint(path, model)
    rebuilt = load_model(path)
    assert same(bits(model), bits(rebuilt)) and rebuilt.head.weight is rebuilt.embed.weight
    assert all(p.requires_grad for p in rebuilt.parameters())
    assert {name: p.dtype for name, p in rebuilt.named_parameters()} == {
        name: p.dtype for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_threads_that_save_to_one_path(build, tmp_path, suffix):
    models = [build(seed) for seed in range(4)]
    path, wrong = tmp_path / f"shared.{suffix}", []
    save_checkpoint(path, models[0], step=0)

    def work(save):
        for _ in range(6):
            try:
                if save is None:
                    step, weights = (rebuilt := build()) and load_checkpoint(path, rebuilt), bits(rebuilt)
                    assert same(weights, bits(models[step]))
                else:
                    save_checkpoint(path, models[save], step=save)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(save,)) for save in (0, 1, 2, 3, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_links_stay_links_and_modes_stay(build, tmp_path, suffix):
    (tmp_path / "runs").mkdir()
    path, link = tmp_path / "runs" / f"step3.{suffix}", tmp_path / f"latest.{suffix}"
    save_checkpoint(path, build(1), step=3)
    expected = tmp_path / "plain"
    expected.touch()
    assert path.stat().st_mode == expected.stat().st_mode
    path.chmod(0o440)
    link.symlink_to(os.path.join("runs", path.name))
    save_checkpoint(link, build(2), step=4)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o440 and os.listdir(path.parent) == [path.name]
    assert load_checkpoint(path, build()) == load_checkpoint(link, build()) == 4
    new = tmp_path / f"to_come.{suffix}"
    new.symlink_to(path.with_name(f"step5.{suffix}"))
    save_checkpoint(new, build(2), step=5)
    assert new.is_symlink() and load_checkpoint(path.with_name(f"step5.{suffix}"), build()) == 5
