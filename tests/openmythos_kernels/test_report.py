"""`report`: the list of paths of each module, why one refuses, and which ran."""

import pytest
import torch

from openmythos_kernels import accelerate, report
from openmythos_kernels.nn import paths
from openmythos_kernels.runtime import extension
from tests.kit.tiny import tiny_model, tokens

pytestmark = pytest.mark.skipif(extension.module is None, reason=str(extension.reason))


def ran(model, ids) -> dict[str, dict[str, int]]:
    return {row.name: {path.name: path.runs for path in row.paths if path.runs} for row in report(model, ids)}


def test_every_fast_module_lists_its_paths():
    rows = {row.name: row for row in report(accelerate(tiny_model()))}
    names = [path.name for path in rows["prelude.0.attn"].paths]
    assert names == [
        *("mla_packed_recompute", "mla_packed", "mla_decode", "mla_recompute", "mla_attention", "sdpa", "reference")
    ]
    assert all(path.runs is None and path.when for row in rows.values() for path in row.paths)
    assert {path.name for path in rows["recurrent"].paths} > {"decode_loop", "early_exit", "fused_step"}


def test_a_path_that_a_module_cannot_take_says_why():
    model = accelerate(tiny_model())
    model.prelude[0].attn.q_norm.register_forward_hook(lambda *_: None)
    rows = {row.name: row for row in report(model)}
    hooked = {path.name: path for path in rows["prelude.0.attn"].paths}
    assert hooked["mla_decode"].backend == "reference" and "q_norm has hooks" in hooked["mla_decode"].reason
    assert hooked["sdpa"].backend == "pytorch"  # it calls the norm
    assert "refuses: q_norm has hooks" in str(report(model))


def test_the_paths_that_ran_are_marked():
    model, ids = accelerate(tiny_model()), tokens(2, 5)
    trained = ran(model, ids)
    assert trained["prelude.0.attn"] == {"mla_attention": 1} and trained["recurrent.block.ffn"] == {"moe_repeated": 4}
    assert trained["recurrent"] == {"early_exit": 1, "fused_enter": 1, "fused_step": 4}
    with torch.no_grad():
        scored = ran(model, ids)
    assert scored["prelude.0"] == {"prefill_block": 1} and scored["recurrent.block.ffn"] == {"moe_inference": 4}
    assert "> ran 4x" in str(report(model, ids))


def test_a_model_that_raises_leaves_no_listener():
    model = accelerate(tiny_model())
    with pytest.raises(ValueError, match="input_ids"):
        report(model, torch.full((1, 2), 10**6))
    assert paths.listener is None
