"""accelerate, report and restore: what a swap changes, and what it must not change."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn as nn

import openmythos
from openmythos import MythosConfig, OpenMythos
from openmythos_kernels import accelerate, report, restore
from openmythos_kernels import nn as fast
from openmythos_kernels.nn.guards import kind_of
from openmythos_kernels.runtime import extension
from tests.kit.tiny import SMALL

FAST = (fast.MLAttention, fast.MoEFFN, fast.RecurrentBlock)


@pytest.fixture(params=["openmythos", "open_mythos"])
def model(request):
    torch.manual_seed(0)
    if request.param == "openmythos":
        return OpenMythos(MythosConfig(**SMALL))
    upstream = request.getfixturevalue("upstream")
    return upstream.OpenMythos(upstream.MythosConfig(**SMALL))


def ids(batch=2, tokens=9):
    return torch.randint(0, SMALL["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(1))


def loss_of(model):
    return nn.functional.cross_entropy(model(ids()).flatten(0, 1), ids().flatten())


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def attributes(model):
    """Module name -> attribute -> id of its value."""
    return {name: {key: id(value) for key, value in vars(module).items()} for name, module in model.named_modules()}


def fast_modules(model):
    return [m for m in model.modules() if isinstance(m, FAST)]


def test_accelerated_model_computes_the_same(model):
    before = model(ids())
    loss_of(model).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert accelerate(model) is model
    assert len(fast_modules(model)) == 3 + 1 + 1  # one attention per block, one MoE, one loop
    torch.testing.assert_close(model(ids()), before, rtol=1e-5, atol=1e-6)
    loss_of(model).backward()
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=1e-3, atol=1e-6, msg=name)


def test_accelerated_decode_computes_the_same(model):
    reference = copy.deepcopy(model)
    accelerate(model)
    ours, theirs = {}, {}
    with torch.no_grad():
        for t in range(9):
            token = ids()[:, t : t + 1]
            a = model(token, kv_cache=ours, start_pos=t)
            b = reference(token, kv_cache=theirs, start_pos=t)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_restore_undoes_exactly(model):
    types, state = classes(model), attributes(model)
    restore(accelerate(model))
    assert classes(model) == types and attributes(model) == state
    restore(model)  # with nothing to undo
    assert classes(model) == types


def test_switches_choose_families_and_can_be_changed(model):
    accelerate(model, moe=False, loop=False)
    assert {kind_of(m) for m in fast_modules(model)} == {fast.MLAttention}
    accelerate(model, attention=False, loop=False)
    assert {kind_of(m) for m in fast_modules(model)} == {fast.MoEFFN}
    model(ids())


def test_parameters_names_and_state_dict_are_untouched(model):
    parameters = [(n, id(p)) for n, p in model.named_parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    accelerate(model)
    assert [(n, id(p)) for n, p in model.named_parameters()] == parameters
    assert model.state_dict().keys() == state.keys()
    fresh = OpenMythos(MythosConfig(**SMALL))
    fresh.load_state_dict(model.state_dict())
    accelerate(fresh).load_state_dict(state)


def test_weights_changed_in_any_way_are_used_at_once(model):
    """In-place edits, load_state_dict, replaced .data and optimizer steps take effect at once."""
    accelerate(model)
    reference = copy.deepcopy(model)

    def equal():
        restore(reference).load_state_dict(model.state_dict())
        torch.testing.assert_close(model(ids()), reference(ids()), rtol=1e-4, atol=1e-5)

    model(ids())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    equal()
    model.load_state_dict({k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    equal()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 0.9
    equal()


@pytest.mark.parametrize("built", ["before", "after"])
def test_training_with_an_optimizer_built_before_or_after(model, built):
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3) if built == "before" else None
    accelerate(model)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-3)
    other = torch.optim.AdamW(reference.parameters(), 1e-3)
    for _ in range(5):
        a, b = loss_of(model), loss_of(reference)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for loss, opt in ((a, optimizer), (b, other)):
            opt.zero_grad()
            loss.backward()
            opt.step()


def test_hooks_still_fire(model):
    ours = isinstance(model, OpenMythos)
    seen = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.append(name))
    model(ids())
    expected = list(seen)
    accelerate(model)
    seen.clear()
    model(ids())
    # The same hooks fire as before the swap, since a fast path that would skip a hooked submodule does not run.
    if ours:
        assert seen == expected
    else:  # open-mythos visits experts slot by slot, the reference once each
        assert set(seen) >= set(expected)


def test_double_and_bfloat16_still_work():
    model = accelerate(OpenMythos(MythosConfig(**SMALL)))
    wide = copy.deepcopy(model).double()
    assert wide(ids()).dtype == torch.float64
    torch.testing.assert_close(wide(ids()), restore(copy.deepcopy(wide))(ids()), rtol=1e-10, atol=1e-12)
    low = model.to(torch.bfloat16)
    loss_of(low).backward()
    assert all(torch.isfinite(p.grad).all() for p in low.parameters() if p.grad is not None)


def test_autocast_still_works():
    model = OpenMythos(MythosConfig(**SMALL))
    with torch.autocast("cpu", torch.bfloat16):
        before = model(ids())
        after = accelerate(model)(ids())
        loss_of(model).backward()
    torch.testing.assert_close(after.float(), before.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_independent(model, way):
    accelerate(model)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    before = model(ids())
    torch.testing.assert_close(twin(ids()), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(model(ids()), before, rtol=0, atol=0)
    assert not fast_modules(restore(twin)) and fast_modules(model)


def test_upstream_model_keeps_its_class_and_configuration(upstream):
    model = upstream.OpenMythos(upstream.MythosConfig(**SMALL))
    cfg, types = model.cfg, classes(model)
    accelerate(model)
    for name, module in model.named_modules():
        assert isinstance(module, types[name]) and type(module).__name__ == types[name].__name__
    assert isinstance(model, OpenMythos) and type(model).__module__ == upstream.OpenMythos.__module__
    assert type(model) is type(accelerate(upstream.OpenMythos(cfg)))  # one class per fast and upstream class
    assert model.cfg is cfg and model.recurrent.cfg is cfg
    restore(model)
    assert classes(model) == types and model.cfg is cfg and model.recurrent.cfg is cfg


def test_a_single_module_can_be_swapped():
    block = OpenMythos(MythosConfig(**SMALL)).recurrent.block
    x = torch.randn(2, 5, SMALL["dim"])
    before = block.ffn(x)
    torch.testing.assert_close(accelerate(block.ffn)(x), before)


def test_subclasses_and_modules_with_their_own_forward_are_not_swapped():
    class Mine(openmythos.MoEFFN):
        def forward(self, x):
            return x

    model = OpenMythos(MythosConfig(**SMALL))
    model.recurrent.block.ffn = Mine(model.cfg)
    model.prelude[0].attn.forward = lambda x, *args: x
    accelerate(model)
    assert type(model.recurrent.block.ffn) is Mine
    assert type(model.prelude[0].attn) is openmythos.MLAttention
    reasons = {row.name: row.reason for row in report(model)}
    assert "subclass" in reasons["recurrent.block.ffn"] and "forward of its own" in reasons["prelude.0.attn"]


def test_report_names_module_backend_and_reason(model):
    rows = {row.name: row for row in report(model)}
    assert all(row.backend == "reference" and "accelerate(model" in row.reason for row in rows.values())
    assert set(rows) == {
        "(model)",
        "prelude.0",
        "prelude.0.attn",
        "recurrent",
        "recurrent.block",
        "recurrent.block.attn",
        "recurrent.block.ffn",
        "coda.0",
        "coda.0.attn",
    }
    rows = {row.name: row for row in report(accelerate(model))}
    assert rows["recurrent.block.ffn"].backend == "cpu"
    text = str(report(model))
    assert "recurrent.block.attn" in text and "MoEFFN" in text


def test_without_the_extension_everything_runs_on_the_reference(monkeypatch, model):
    before = model(ids())
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "reason", "no compiler here")
    with pytest.warns(UserWarning, match="no compiler here"):
        accelerate(model)
    torch.testing.assert_close(model(ids()), before, rtol=1e-6, atol=1e-6)
    assert all(row.backend == "reference" and "no compiler here" in row.reason for row in report(model))


BAD = [
    (lambda m: accelerate("model"), TypeError, "model: got str"),
    (lambda m: accelerate(m, moe="yes"), TypeError, "moe = 'yes'"),
    (lambda m: accelerate(m, backend="fpga"), ValueError, "backend = 'fpga'"),
    (lambda m: accelerate(m, backend="triton"), RuntimeError, "backend = 'triton' cannot run"),
    (lambda m: accelerate(m, experts=True), TypeError, "experts"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[b[2] for b in BAD])
def test_bad_arguments_swap_nothing(model, call, error, message):
    types = classes(model)
    with pytest.raises(error, match=message.replace("(", r"\(")):
        call(model)
    assert classes(model) == types


@pytest.mark.parametrize("threshold", [2.0, -1.0])
def test_upstream_thresholds_that_never_or_always_halt(upstream, threshold):
    model = upstream.OpenMythos(upstream.MythosConfig(**SMALL, act_threshold=threshold))
    before = model(ids())
    torch.testing.assert_close(accelerate(model)(ids()), before, rtol=1e-5, atol=1e-6)


def test_a_named_backend_that_runs_gives_no_warning(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model, backend="cpu")
        accelerate(model, backend="reference")


def test_the_user_is_told_what_was_not_swapped_and_how_much():
    model = OpenMythos(MythosConfig(**SMALL))
    for block in (model.prelude[0], model.coda[0]):
        block.attn.forward = lambda x, *args: x
    with pytest.warns(UserWarning, match="left as they are: 2 .*forward of its own.*; swapped: 7") as caught:
        accelerate(model)
    assert len(caught) == 1


@pytest.mark.parametrize("module", [nn.Linear(2, 3), nn.Sequential(nn.RMSNorm(4))], ids=["Linear", "Sequential"])
def test_the_user_is_told_that_nothing_was_swapped(module):
    with pytest.warns(UserWarning, match=f"nothing was swapped: {type(module).__name__}"):
        accelerate(module)


def test_modules_around_an_upstream_layer_that_is_not_swapped(upstream):
    """Only upstream's code calls an upstream layer with upstream's arguments, so its parents are not swapped either."""

    class Louder(upstream.MLAttention):
        def forward(self, x, freqs_cis, mask=None, kv_cache=None, cache_key="default"):
            return 2 * super().forward(x, freqs_cis, mask, kv_cache, cache_key)

    model = upstream.OpenMythos(upstream.MythosConfig(**SMALL))
    model.coda[0].attn.__class__ = Louder
    before = model(ids())
    with pytest.warns(UserWarning, match=r"left as they are: 1 \(.*\), and 2 around them; swapped: 6"):
        accelerate(model)
    torch.testing.assert_close(model(ids()), before, rtol=1e-5, atol=1e-6)
    rows = {row.name: row for row in report(model)}
    assert "subclass of MLAttention" in rows["coda.0.attn"].reason
    assert (
        rows["coda.0"].reason == "its attn is left as it is" and rows["(model)"].reason == "its coda.0 is left as it is"
    )
    assert rows["recurrent"].backend == rows["prelude.0"].backend == "cpu"


def test_a_config_with_unknown_fields_is_not_swapped(upstream):
    cfg = upstream.MythosConfig(**SMALL)
    cfg.sliding_window = 4
    model = upstream.OpenMythos(cfg)
    with pytest.warns(UserWarning, match="sliding_window"):
        accelerate(model)
    assert type(model) is upstream.OpenMythos and not isinstance(model.recurrent, openmythos.RecurrentBlock)
    assert isinstance(model.prelude[0], openmythos.TransformerBlock)


@pytest.mark.parametrize("order", ["accelerate, then shard", "shard, then accelerate"])
def test_fully_shard_and_accelerate_in_either_order(model, order, tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    before = model(ids()).detach()
    types = classes(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def shard():
            for part in (model.prelude[0], model.recurrent.block, model):
                fully_shard(part, mesh=mesh)

        for step in order.split(", then "):
            shard() if step == "shard" else accelerate(model)
        rows = {row.name: row for row in report(model)}
        assert len(rows) == 9 and all(row.backend == "cpu" for row in rows.values())
        torch.testing.assert_close(model(ids()), before, rtol=1e-5, atol=1e-6)
        restore(model)
        assert isinstance(model, FSDPModule) and isinstance(model, types[""]) and not fast_modules(model)
        torch.testing.assert_close(model(ids()), before, rtol=1e-5, atol=1e-6)
    finally:
        dist.destroy_process_group()


def test_a_swapped_class_pickles_to_the_same_class(upstream):
    model = accelerate(upstream.OpenMythos(upstream.MythosConfig(**SMALL)))
    assert pickle.loads(pickle.dumps(type(model))) is type(model)
    assert type(copy.deepcopy(model)) is type(model)


def test_upstreams_generate_keeps_its_default_number_of_loops(upstream):
    model = accelerate(upstream.OpenMythos(upstream.MythosConfig(**SMALL)))
    seen = []
    model.recurrent.register_forward_pre_hook(lambda module, args: seen.append(args[4]))
    model.generate(ids()[:, :4], 1)
    model.generate(ids()[:, :4], 1, 2)
    assert seen == [8, 2]


def test_methods_patched_after_the_swap_are_reported(upstream, monkeypatch):
    model = accelerate(upstream.OpenMythos(upstream.MythosConfig(**SMALL)))
    monkeypatch.setattr(upstream.MLAttention, "forward", lambda self, x, *rest: x)
    rows = {row.name: row for row in report(model)}
    assert "since accelerate: MLAttention.forward was replaced" in rows["coda.0.attn"].reason
    assert rows["recurrent.block.ffn"].reason == ""
