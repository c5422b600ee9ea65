"""Modified open-mythos code: `accelerate` does not change its results, and reports what it did not swap.

Forks are made from the installed file by replacing a line, and are loaded from a path that ends like upstream's.
"""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from openmythos_kernels import accelerate, report
from tests.outside.forks import fork
from tests.outside.works import assert_same, make, make_from, results

REMAINDER = (
    "remainder = (1.0 - cumulative_p).clamp(min=0)",
    "remainder = (1.0 - cumulative_p - p * 0.25).clamp(min=0)",
)
CHANGES = {
    "another remainder": ([REMAINDER], {"RecurrentBlock"}),
    "another norm": ([("x.pow(2).mean(-1, keepdim=True)", "x.pow(2).mean(-1, keepdim=True).mul(0.9)")], {"RMSNorm"}),
    "another activation": ([("F.silu(", "F.gelu(")], {"Expert"}),
    "another attention attribute": ([("self.attn_drop", "self.drop")], {"MLAttention"}),
    "another attention scale": ([("scale = self.q_head_dim**-0.5", "scale = self.q_head_dim**-0.4")], {"MLAttention"}),
    "another rotary function": ([("xc * freqs_cis", "xc * freqs_cis.conj()")], {"MLAttention"}),
    "another loop embedding": ([("theta: float = 10000.0", "theta: float = 500.0")], {"RecurrentBlock"}),
    "another default of a function": ([("eps: float = 1e-6", "eps: float = 1e-2")], {"RMSNorm"}),
    "more config fields": (
        [("    dropout: float = 0.0\n", "    dropout: float = 0.0\n    tie_weights: bool = True\n")],
        set(),
    ),
}


@pytest.fixture(autouse=True)
def _forget():
    yield
    sys.modules.pop("forked", None)


def swapped(model):
    """The accelerated model, and the warnings of `accelerate`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accelerate(model)
    return model, [
        str(w.message) for w in caught if "openmythos_kernels" in str(w.message) and "not the" not in str(w.message)
    ]


@pytest.mark.parametrize("name", CHANGES)
def test_a_fork_computes_the_same(tmp_path, upstream, name):
    changes, classes = CHANGES[name]
    source = fork(tmp_path, *changes)
    before = results(make_from(source))
    if name not in ("more config fields", "another attention attribute"):
        other = results(make_from(upstream))
        assert float((other["prompt"]["logits"] - before["prompt"]["logits"]).norm()) > 1e-3  # the change matters
    model, said = swapped(make_from(source))
    assert_same(results(model), before)
    rows = report(model)
    left = {row.kind for row in rows if row.backend == "reference" and row.reason}
    if classes:
        assert len(said) == 1 and any(letter.isdigit() for letter in said[0]), (
            said
        )  # one warning, with the number of modules
        for cls in classes & {"MLAttention", "RecurrentBlock"}:
            assert cls in left, str(rows)


def test_a_fork_with_other_comments_and_layout_is_swapped(tmp_path, upstream):
    """Comments, docstrings and line breaks do not change the code."""
    source = fork(
        tmp_path,
        ("Root Mean Square Layer Normalization", "The norm"),
        ("        # KV compress\n", "        # Keys and values,\n        # packed.\n"),
        (
            "        rms = x.pow(2).mean(-1, keepdim=True).add(self.eps).rsqrt()\n",
            "        rms = (\n            x.pow(2).mean(-1, keepdim=True).add(self.eps).rsqrt()\n        )\n",
        ),
    )
    before = results(make_from(source))
    model, said = swapped(make_from(source))
    assert not said
    assert_same(results(model), before)
    assert [row.backend for row in report(model)] == [row.backend for row in report(accelerate(make("open_mythos")))]


def test_a_model_in_which_nothing_can_be_swapped_warns_once(tmp_path):
    """Every class of the fork differs from upstream's, though it computes the same."""
    source = fork(tmp_path, ("super().__init__()", "super().__init__()\n        self.mine = True"))
    before = results(make_from(source))
    model, said = swapped(make_from(source))
    assert len(said) == 1
    assert_same(results(model), before)
    _, said = swapped(torch.nn.Linear(2, 2))
    assert len(said) == 1


def subclass(upstream):
    class Attention(upstream.MLAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 1.25

    def change(model):
        model.prelude[0].attn.__class__ = Attention

    return change


def own_forward(upstream):
    def change(model):
        inner = model.recurrent.block.forward
        model.recurrent.block.forward = lambda *args, **kwargs: inner(*args, **kwargs) * 1.25

    return change


@pytest.mark.parametrize("make_change", [subclass, own_forward])
def test_a_model_with_one_changed_part(upstream, make_change):
    change = make_change(upstream)
    plain, fast = make("open_mythos"), make("open_mythos")
    change(plain)
    change(fast)
    before = results(plain)
    fast, said = swapped(fast)
    assert_same(results(fast), before)
    assert len(said) == 1 and "1" in said[0], said
    assert any(row.backend == "reference" and row.reason for row in report(fast))


@pytest.mark.parametrize("name", ["apply_rope", "loop_index_embedding"])
def test_a_patched_function_of_the_module(upstream, monkeypatch, name):
    """Functions that upstream's methods call by a global name are part of their code."""
    inner = getattr(upstream, name)
    monkeypatch.setattr(upstream, name, lambda x, *rest, **named: inner(x, *rest, **named) * 1.25)
    before = results(make("open_mythos"))
    fast = accelerate(make("open_mythos"))
    assert_same(results(fast), before)
    assert str(report(fast))


def test_a_replaced_causal_mask(upstream, monkeypatch):
    """The static method that makes masks is replaced by one that hides nothing."""
    monkeypatch.setattr(
        upstream.OpenMythos, "_causal_mask", staticmethod(lambda T, device, *_: torch.zeros(1, 1, T, T))
    )
    before = results(make("open_mythos"))
    assert_same(results(accelerate(make("open_mythos"))), before)
