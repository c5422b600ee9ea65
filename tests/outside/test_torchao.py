"""Weights quantized by torchao are tensors of a subclass, which no op reads."""

from __future__ import annotations

import pytest
import torch

from openmythos_kernels import accelerate, report
from tests.outside.installed import need
from tests.outside.works import PACKAGES, assert_same, decode, make, prompt

need("torchao")
quantization = need("torchao.quantization")
pytestmark = pytest.mark.filterwarnings("ignore")


def quantize(model):
    """Quantizes all linear layers except the halting head, whose weight the reference requires to be plain."""
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        lambda part, name: type(part) is torch.nn.Linear and not name.endswith("act.halt"),
    )


def works(model):
    """Results without training, which quantized weights do not support."""
    return {work.__name__: work(model) for work in (prompt, decode)}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("order", ["before", "after"])
def test_int8_weights(package, order):
    plain, fast = make(package), make(package)
    quantize(plain)
    before = works(plain)
    if order == "before":
        quantize(fast)
        accelerate(fast)
    else:
        quantize(accelerate(fast))
    assert_same(works(fast), before)
    rows = report(fast)
    attention = [row for row in rows if row.name.endswith("attn")]
    assert attention and all(row.backend == "reference" and row.reason for row in attention), str(rows)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_prompt_in_training_mode(package):
    """Logits stay the same with gradients enabled. Compared by norm like every result here: a logit near zero carries
    the rounding of logits of about 10."""
    plain, fast = make(package), make(package)
    quantize(plain)
    quantize(accelerate(fast))
    ids = torch.arange(9)[None]
    found, expected = ({"prompt": {"logits": model.train()(ids).detach()}} for model in (fast, plain))
    assert_same(found, expected)
