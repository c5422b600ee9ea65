"""LoRA by PEFT on the linear layers of attention and experts, before and after `accelerate`."""

from __future__ import annotations

import pytest
import torch

from openmythos_kernels import accelerate, report
from tests.outside.installed import need
from tests.outside.works import IDS, PACKAGES, assert_same, make, results

peft = need("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {
    "attention": ["q_down", "q_up_nope", "kv_down", "kv_up", "wo"],
    "experts": ["gate", "up", "down"],
    "router and halting": ["router", "halt"],
}


def adapted(model, targets):
    torch.manual_seed(2)
    # A scaling of 1/2. With 4, experts' gradients were 2e-4 apart in float32 if every weight moved by one ulp.
    config = peft.LoraConfig(r=2, lora_alpha=1, target_modules=TARGETS[targets], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, model)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_change_the_results(package, targets, order):
    plain, fast = make(package), make(package)
    before = results(adapted(plain, targets))
    if order == "before":
        accelerate(adapted(fast, targets))
    else:
        adapted(accelerate(fast), targets)
    assert_same(results(fast), before)
    assert str(report(fast))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_whole_peft_model_trains_and_merges(package):
    """get_peft_model freezes the base model; after merge_and_unload, weights are plain and fast modules run again."""
    config = peft.LoraConfig(
        r=2, target_modules=TARGETS["attention"]
    )  # adapters start at zero, so that differences stay as small as rounding
    torch.manual_seed(2)
    plain = peft.get_peft_model(make(package), config)
    torch.manual_seed(2)
    fast = peft.get_peft_model(accelerate(make(package)), config)
    for model in (plain, fast):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS).logsumexp(-1).mean().backward()
            optimizer.step()
    torch.testing.assert_close(fast(IDS), plain(IDS), rtol=1e-3, atol=1e-3)
    plain.load_state_dict(fast.state_dict())
    merged, expected = fast.merge_and_unload(), plain.merge_and_unload()
    assert_same(results(merged), results(expected))
    assert [row.backend for row in report(merged)] == [row.backend for row in report(accelerate(make(package)))]
