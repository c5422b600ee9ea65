"""What the kernels that decode whole layers compile to, at mythos_1b's sizes, and what their launches refuse.

`tests/triton_on_cpu/test_specifications.py` and `tests/openmythos_kernels/nn/paths/test_decode_on_gpu.py` have their
numbers.
"""

import pytest
import torch

from openmythos_kernels.ops.layer import BlockWeights, block_decode
from openmythos_kernels.runtime import backends
from openmythos_kernels.runtime.target import TARGETS, targeting
from openmythos_kernels.verify.specs import specifications
from tests.openmythos_kernels.ops.test_on_gpu import LAYERS

pytest.importorskip("triton")
import triton

from openmythos_kernels.ops.layer import configs
from openmythos_kernels.verify.ahead.build import build, gpu_target
from openmythos_kernels.verify.ahead.record import launches
from openmythos_kernels.verify.ahead.table import ASYNCHRONOUS

OURS = {
    "added_linear_kernel",
    "enter_kernel",
    "experts_down_kernel",
    "experts_up_kernel",
    "normed_linear_kernel",
    "queries_kernel",
    "step_kernel",
    "values_kernel",
}
OPS = {d.name: d for d in specifications() if d.name in backends.UNPROVEN}


def launched(target) -> list:
    """Each kernel of each op and case once per configuration."""
    found = {}
    for op in OPS.values():
        for sizes in LAYERS.values():
            for x in launches(op, sizes | dict(experts=sizes["experts"] and 64), torch.bfloat16, target):
                found[(x.name, str((x.signature, x.constants, x.hints, x.options)))] = x
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_the_code_neither_spills_nor_exceeds_the_shared_memory(name):
    target = TARGETS[name]
    for launch in launched(target):
        built = build(launch, target)
        assert built.spilled == 0 and built.shared <= target.shared_memory, launch.name
        stages = launch.options.get("num_stages", 3)
        assert built.instruction != "missing" and (stages > 1 or built.instruction not in ASYNCHRONOUS), launch.name


@pytest.mark.parametrize("name, overlaps", [("sm_80", False), ("sm_90", True), ("gfx942", False)])
def test_launches_overlap_where_gpus_can(name, overlaps):
    """In all kernels but the walk over the cache, whose other users' launches do not."""
    target, waits = TARGETS[name], "griddepcontrol.wait"
    found = launches(OPS["loop_decode"], OPS["loop_decode"].cases["plain"], torch.float32, target)
    assert {x.name for x in found if x.options.get("launch_pdl")} == (OURS if overlaps else set())
    step = next(x for x in found if x.name == "step_kernel")
    code = triton.compile(step.source(), target=gpu_target(target), options=step.options).asm
    assert (waits in code.get("ptx", "")) == overlaps


@pytest.mark.parametrize("programs, capacity, splits", [(1, 4096, 64), (1, 640, 10), (16, 4096, 8), (200, 4096, 1)])
def test_splits_fill_the_device_with_a_tile_of_keys_or_more_each(programs, capacity, splits):
    with targeting(TARGETS["sm_90"]):
        assert configs.splits(programs, capacity, 64) == splits


BAD = {
    "attn_norm": lambda x: x["attention"].__setitem__(0, x["attention"][0][:-1]),
    "ffn_norm": lambda x: x["attention"].__setitem__(9, x["attention"][9].double()),
    "router": lambda x: x["router"].__setitem__(0, x["router"][0][:, :-1]),
    "router_bias": lambda x: x["router"].__setitem__(1, x["router"][1].double()),
    "topk": lambda x: x.update(topk=9),
    "latent_caches": lambda x: x["latent_caches"].pop(),
    "rope_cache": lambda x: x["rope_caches"].__setitem__(1, x["rope_caches"][1][:, :-1]),
    "lora_B": lambda x: x["lora"].__setitem__(2, x["lora"][2][:-1]),
    "halt_weight": lambda x: x["step"].__setitem__(3, x["step"][3][0]),
    "embeddings": lambda x: x["embeddings"].__setitem__(1, x["embeddings"][1].double()),
    "e": lambda x: x.update(e=x["e"][:1]),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_argument(name):
    """Before anything is launched."""
    op = OPS["loop_decode"]
    inputs = op.make(op.cases["plain"], torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    BAD[name](inputs)
    with backends.forcing("triton"), pytest.raises(ValueError, match=rf"\b{name}\b"):
        op.fast(**inputs)


def test_float64_is_refused():
    op = OPS["block_decode"]
    inputs = op.make(op.cases["plain"], torch.float64, torch.device("cpu"), torch.Generator().manual_seed(0))
    with backends.forcing("triton"), pytest.raises(ValueError, match="the Triton kernels take"):
        op.fast(**inputs)


@pytest.mark.parametrize("triton_mode", ["interpreter"])
def test_a_token_without_room_is_not_written_and_sees_the_whole_row(triton_mode):
    op = OPS["block_decode"]
    sizes = op.cases["dense"] | dict(held=[3, 9])
    inputs = op.make(sizes, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    inputs["lengths"][1] = sizes["capacity"]
    latent, rope = inputs["latent_cache"].clone(), inputs["rope_cache"].clone()
    weights = BlockWeights(**{name: value for name, value in inputs.items() if name in BlockWeights._fields})
    with backends.forcing("triton"):
        y, _ = block_decode(inputs["x"], inputs["freqs"], inputs["lengths"], latent, rope, weights)
    assert y.isfinite().all()
    for cache, before in ((latent, inputs["latent_cache"]), (rope, inputs["rope_cache"])):
        assert torch.equal(cache[1], before[1]) and not torch.equal(cache[0, 3], before[0, 3])
