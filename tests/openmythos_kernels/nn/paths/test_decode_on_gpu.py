"""A GPU's token through whole-layer ops, without a GPU: how many launches it is, and what the kernels compute.

The models have mythos_1b's structure; sizes do not change the number of launches.
"""

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from openmythos import KVCache
from openmythos_kernels import accelerate
from openmythos_kernels.nn.lengths import to_device
from openmythos_kernels.nn.paths import decode_block, decode_loop
from openmythos_kernels.nn.paths.cuda_graph import Lengths, token_step
from openmythos_kernels.runtime import backends, unproven
from tests.kit.tiny import tiny_model, tokens

pytest.importorskip("triton")
LOOPS, PROMPT, MOST = 4, 3, 80
# Operators of PyTorch that run no kernel on a GPU of their own.
NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "view",
    "reshape",
    "as_strided",
    "expand",
    "transpose",
    "t",
}
NO_KERNEL |= {
    "select",
    "slice",
    "narrow",
    "squeeze",
    "unsqueeze",
    "permute",
    "unbind",
    "alias",
    "detach",
    "_unsafe_view",
}
NO_KERNEL |= {"resolve_conj", "resolve_neg", "lift_fresh", "to", "_to_copy", "view_as_real"}


def model(**fields):
    sides = dict(prelude_layers=2, coda_layers=2, n_shared_experts=2)
    return tiny_model(halt=0.3, **sides, **fields)


def filled(model, rows: int) -> KVCache:
    cache = KVCache(PROMPT + 4)
    with torch.no_grad():
        model(tokens(rows, PROMPT), n_loops=LOOPS, kv_cache=cache)
    cache.truncate([PROMPT - b % 2 for b in range(rows)])
    return cache


def stepped(model, cache: KVCache, ids: torch.Tensor, lengths: Lengths) -> torch.Tensor:
    """The token's logits, as a graph computes them, by Triton's kernels."""
    with torch.no_grad(), backends.forcing("triton"), unproven.allowing():
        return token_step(model, ids, lengths, cache.lengths, LOOPS, cache)


def launches(model, rows: int) -> list[str]:
    """The names of all that a token launches. Nothing of Triton's is run, so its numbers are wild."""
    from openmythos_kernels.verify.ahead.record import recording

    cache, ids = filled(model, rows), tokens(rows, 1, seed=1)
    lengths = Lengths(to_device(cache.lengths, ids.device))
    with recording():
        stepped(model, cache, ids, lengths)  # makes what is kept, as the call before a capture does
    with recording() as found, profile(activities=[ProfilerActivity.CPU]) as watched:
        stepped(model, cache, ids, lengths)

    def kernels(event) -> list[str]:
        inner = [name for child in event.cpu_children for name in kernels(child)]
        own = event.name.startswith("aten::") and event.name.removeprefix("aten::") not in NO_KERNEL
        return inner or [event.name] * own

    return [x.name for x in found] + [n for e in watched.events() if e.cpu_parent is None for n in kernels(e)]


# Outside of the layers: embedding, angles, norm, head, and the rows' lengths.
AROUND = ["rms_norm_kernel", "aten::index_select", "aten::index", "aten::mm", "aten::add_"]


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("act", [True, False])
def test_a_token_is_at_most_so_many_launches(rows, act, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # that were launches
    found = launches(accelerate(model(halting="evolve" if act else "off")), rows)
    around = AROUND + ["aten::zero_"] * (not act)  # the ponder cost where nothing halts
    assert sorted(name for name in found if name in AROUND or name.startswith("aten::")) == sorted(around)
    assert len(found) == len(around) + 4 * 7 + 1 + LOOPS * (8 + 1) <= MOST


def test_more_rows_than_the_kernels_are_for_decode_as_before():
    names = launches(accelerate(model()), decode_block.GPU_ROWS + 1)
    assert "append_kernel" in names and not {"queries_kernel", "step_kernel"} & set(names)


@pytest.mark.parametrize("triton_mode", ["interpreter"])
@pytest.mark.parametrize("rows", [1, 16])
@torch.no_grad()
def test_logits_and_caches_equal_the_references(triton_mode, rows, monkeypatch):
    used = []
    for module, name in ((decode_block, "block_decode"), (decode_loop, "loop_decode")):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _op=op, _name=name, **k: used.append(_name) or _op(*a, **k))
    reference = model()
    caches = filled(reference, rows), filled(reference, rows)
    ids = tokens(rows, 1, seed=1)
    lengths = Lengths(to_device(caches[0].lengths, ids.device))
    found = stepped(accelerate(copy.deepcopy(reference)), caches[0], ids, lengths)
    assert lengths.asked == len(caches[0]) and lengths.tensor.tolist() == caches[0].lengths
    expected = reference.decoder(caches[1], n_loops=LOOPS)(ids)
    assert used == ["block_decode"] * 2 + ["loop_decode"] + ["block_decode"] * 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for key, entry in caches[1].items():
        assert caches[0][key].lengths == entry.lengths
        for name, held in entry.tensors.items():
            for b, n in enumerate(entry.lengths):
                torch.testing.assert_close(caches[0][key].tensors[name][b, :n], held[b, :n], rtol=1e-4, atol=1e-5)
