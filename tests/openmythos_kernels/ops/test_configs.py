"""Tile shapes of any size, also of those that nobody ships: docs/compile.csv has the figures of the shipped ones."""

import itertools

import pytest

from openmythos_kernels.ops.mla import configs as mla
from openmythos_kernels.ops.moe import configs as moe
from openmythos_kernels.runtime.target import TARGETS, targeting

WIDTHS = (8, 64, 96, 128, 256)
LATENTS = (32, 256, 384, 512, 1024, 1536, 2048)


@pytest.mark.parametrize("name", ["sm_90", "sm_100"])
def test_products_that_read_shared_memory_on_their_own_have_several_stages(name):
    """float32 has none of them; the test of the kept table asserts it."""
    with targeting(TARGETS[name]):
        heads = itertools.product(mla.KERNELS, WIDTHS, WIDTHS, WIDTHS, (False, True))
        found = [mla.attention(kernel, 2, *widths, packed) for kernel, *widths, packed in heads]
        found += [mla.latent(2, heads, r) for heads in (1, 16, 48, 128) for r in LATENTS]
        found += [config for kernel in ("forward", "dq", "dkv") for config in mla.candidates(kernel)]
        found += [config for heads in (16, 128) for r in LATENTS for config in mla.latent_candidates(heads, r)]
        found += list(moe._TABLE[name][2].values())
    assert [config for config in found if config.stages < 2] == []


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_target_has_configurations(name, itemsize):
    with targeting(TARGETS[name]):
        for kernel, widths in itertools.product(mla.KERNELS, itertools.product(WIDTHS, WIDTHS, WIDTHS)):
            assert mla.attention(kernel, itemsize, *widths).stages
        for heads, r in itertools.product((1, 16, 48, 128), LATENTS):
            config = mla.latent(itemsize, heads, r)
            assert config.block_r * -(-r // config.block_r) >= r and config.block_h >= 8
        for kernel in moe._KINDS:
            assert all(moe.experts(kernel, itemsize, moe.rows(itemsize, n)).stages for n in (1, 16, 40, 100, 9999))
