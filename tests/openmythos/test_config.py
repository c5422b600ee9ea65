import numpy as np
import pytest
import torch

from openmythos import DenseConfig, DenseTransformer, MythosConfig, OpenMythos
from tests.kit.tiny import SMALL, enliven, relative, tiny_config, tiny_model, tokens
from tests.kit.upstream import load_upstream


@pytest.mark.parametrize(
    "field, value, rule",
    [
        *((name, bad, "an integer >= 1") for bad in (0, -3, 2.0, True, None, "4") for name in ("dim", "n_heads")),
        *(
            (name, 0, "an integer >= 1")
            for name in [
                "vocab_size",
                "n_kv_heads",
                "max_seq_len",
                "max_loop_iters",
                "kv_lora_rank",
                "q_lora_rank",
                "qk_rope_head_dim",
                "core_layers",
                "qk_nope_head_dim",
                "v_head_dim",
                "n_experts",
                "n_experts_per_tok",
                "expert_dim",
                "max_output_tokens",
                "ffn_dim",
            ]
        ),
        *((name, -1, "an integer >= 0") for name in ("prelude_layers", "coda_layers", "n_shared_experts", "lora_rank")),
        ("attn_type", "mha", "one of mla, gqa"),
        ("injection", "none", "one of mythos, residual, parcae, concat, add"),
        ("h0", "h", "one of e, zeros, noise"),
        ("halting", True, "one of evolve, freeze, off"),
        ("act_remainder", "first", "one of drop, last"),
        ("core_ffn", "gated", "one of moe, dense"),
        ("dim", 1, "at least 2"),
        ("qk_rope_head_dim", 5, "even"),
        ("n_experts_per_tok", 6, "<= n_experts=5"),
        *(("act_threshold", bad, "> 0") for bad in (0, -0.1, float("nan"))),
        ("n_heads", np.bool_(True), "an integer >= 1"),
        ("n_heads", np.float64(2.0), "an integer >= 1"),
        ("act_threshold", "0.9", "a number"),
        *(("rope_theta", bad, "> 0 and finite") for bad in (0, -1.0, float("inf"), float("nan"))),
        *(("dropout", bad, "in [0, 1)") for bad in (-0.1, 1, float("nan"))),
    ],
)
def test_errors_name_field_value_and_rule(field, value, rule):
    with pytest.raises(ValueError) as error:
        tiny_config(**{field: value})
    assert f"MythosConfig.{field} = {value!r}: must be {rule}" in str(error.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(dim=25), r"n_heads = 2: must be a divisor of dim=25"),
        (dict(n_heads=4, n_kv_heads=3), r"n_kv_heads = 3: must be a divisor of n_heads=4"),
        (dict(dim=6, n_heads=2), r"n_heads = 2: must be such that dim / n_heads = 3 is even"),
    ],
)
def test_heads_of_grouped_query_attention(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(attn_type="gqa", **fields)
    OpenMythos(tiny_config(attn_type="mla", **fields))  # latent attention has no such rule


def test_models_check_fields_set_later():
    cfg = tiny_config()
    cfg.n_heads = 0
    with pytest.raises(ValueError, match="n_heads = 0"):
        OpenMythos(cfg)
    dense = DenseConfig(vocab_size=7, dim=8, n_heads=2, n_layers=1)
    dense.n_layers = 0
    with pytest.raises(ValueError, match="n_layers = 0: must be an integer >= 1"):
        DenseTransformer(dense)


def test_derived_widths():
    assert tiny_config(dim=23).dense_dim == 30 and tiny_config(ffn_dim=5).dense_dim == 5
    assert tiny_config().rope_dim == 4 and tiny_config(attn_type="gqa").rope_dim == 12
    assert MythosConfig().dense_dim == 2730


def test_numbers_of_numpy_and_tensors_become_pythons():
    cfg = tiny_config(
        dim=np.int64(24),
        n_heads=torch.tensor(2),
        ffn_dim=np.int32(8),
        act_threshold=np.float32(0.75),
        rope_theta=np.float64(1e4),
    )
    found = [getattr(cfg, name) for name in ("dim", "n_heads", "ffn_dim", "act_threshold", "rope_theta")]
    assert found == [24, 2, 8, 0.75, 1e4] and [type(x) for x in found] == [int, int, int, float, np.float64]
    OpenMythos(cfg)


@pytest.mark.parametrize("threshold", [1.5, 2.0, float("inf")])
def test_thresholds_above_one_are_upstreams(threshold):
    """A threshold that the sum of a position's halting probabilities does not reach switches halting off."""
    theirs = load_upstream()
    upstream = enliven(theirs.OpenMythos(theirs.MythosConfig(**SMALL, act_threshold=threshold))).eval()
    model = tiny_model(act_threshold=threshold)
    ids = tokens(2, 9)
    for n_loops in (1, 4, 6):
        assert relative(model(ids, n_loops=n_loops), upstream(ids, n_loops=n_loops)) < 1e-5


def test_numbers_of_loops_and_positions_of_numpy_and_tensors():
    model, ids = tiny_model(), tokens(2, 5)
    for n in (np.int64(3), torch.tensor(3), np.array(3)):
        assert torch.equal(model(ids, n_loops=n), model(ids, n_loops=3))
        assert torch.equal(model(ids, start_pos=n), model(ids, start_pos=3))
    for n in (np.array([2, 3]), torch.tensor([2, 3]), (2, 3)):
        assert torch.equal(model(ids, n_loops=n), model(ids, n_loops=[2, 3]))
        assert torch.equal(model(ids, start_pos=n), model(ids, start_pos=[2, 3]))
    assert model(ids, grad_loops=np.int64(1)).requires_grad
    for bad in (True, 2.0, "3", np.bool_(True), torch.tensor(2.5), [2, None], np.zeros((2, 2), int)):
        with pytest.raises(ValueError, match="n_loops = "):
            model(ids, n_loops=bad)
        with pytest.raises(ValueError, match="start_pos = "):
            model(ids, start_pos=bad)
