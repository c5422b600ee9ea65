"""The named sizes hold what their names and the issue's claims say."""

import subprocess
import sys

import pytest

from openmythos.sizes import measure
from openmythos.variants import VARIANTS, dense_1_3b, mythos_1b, rdt_770m


@pytest.fixture(scope="module")
def sizes():
    return {
        name: measure(VARIANTS[name]()) for name in ("mythos_1b", "mythos_3b", "mythos_10b", "rdt_770m", "dense_1_3b")
    }


@pytest.mark.parametrize("name, parameters", [("rdt_770m", 770e6), ("dense_1_3b", 1.3e9)])
def test_matched_pair_has_the_promised_parameter_counts(sizes, name, parameters):
    assert abs(sizes[name].parameters / parameters - 1) < 0.02


def test_matched_pair_shares_vocabulary_and_context():
    looped, dense = rdt_770m(), dense_1_3b()
    assert (looped.vocab_size, looped.max_seq_len) == (dense.vocab_size, dense.max_seq_len) == (32768, 2048)
    assert (looped.prelude_layers, looped.core_layers, looped.coda_layers, looped.max_loop_iters) == (6, 6, 6, 8)
    assert dense.n_layers == 24


@pytest.mark.parametrize("name", ["mythos_1b", "mythos_3b", "mythos_10b"])
def test_latent_cache_is_a_fourteenth_of_full_keys_and_values(sizes, name):
    assert sizes[name].entry_bytes * 14 <= sizes[name].full_entry_bytes


def test_costs_of_mythos_1b_by_hand(sizes):
    cfg, size = mythos_1b(), sizes["mythos_1b"]
    idle = 3 * cfg.dim * cfg.expert_dim * (cfg.n_experts - cfg.n_experts_per_tok)
    assert size.parameters - size.active_parameters == idle
    layers = cfg.prelude_layers + cfg.coda_layers + cfg.max_loop_iters
    assert size.cache_bytes == (cfg.kv_lora_rank + cfg.qk_rope_head_dim) * 2 * layers


def test_published_sizes_equal_upstreams(upstream_variants):
    ours = {name: make for name, make in VARIANTS.items() if name.startswith("mythos_")}
    assert len(ours) == 7
    for name, make in ours.items():
        theirs = vars(getattr(upstream_variants, name)())
        assert {key: getattr(make(), key) for key in theirs} == theirs, name


@pytest.fixture
def upstream_variants(upstream):
    """open_mythos.variants, loaded by path like main.py: the package's __init__ needs transformers."""
    import importlib.util
    import types
    from pathlib import Path

    path = Path(upstream.__file__).with_name("variants.py")
    spec = importlib.util.spec_from_file_location("open_mythos_variants", path)
    module = importlib.util.module_from_spec(spec)
    # variants.py imports open_mythos.main by name.
    package = types.ModuleType("open_mythos")
    saved = {name: sys.modules.get(name) for name in ("open_mythos", "open_mythos.main")}
    sys.modules.update({"open_mythos": package, "open_mythos.main": upstream})
    try:
        spec.loader.exec_module(module)
    finally:
        for name, old in saved.items():
            sys.modules.pop(name)
            if old is not None:
                sys.modules[name] = old
    return module


def test_sizes_command_prints_a_row_per_size():
    run = subprocess.run(
        [sys.executable, "-m", "openmythos", "sizes", "mythos_1b"], capture_output=True, text=True, check=True
    )
    assert "mythos_1b" in run.stdout and "1.064 B" in run.stdout and "14.2x" in run.stdout


def test_sizes_command_refuses_an_unknown_name():
    run = subprocess.run([sys.executable, "-m", "openmythos", "sizes", "mythos_2b"], capture_output=True, text=True)
    assert run.returncode == 2 and "mythos_2b" in run.stderr and "mythos_1b" in run.stderr
