import dataclasses
import json
import os
import pickle
import random
import sys
import warnings
import zipfile

import pytest
import safetensors
import safetensors.torch
import torch

import openmythos.training.checkpoint as module
from openmythos.training import Batches, corpus, load_checkpoint, load_model, make_optimizer, save_checkpoint, train
from tests.kit.bits import bits, same

SUFFIXES = ["pt", "safetensors"]


def stepped(model):
    """The model's optimizer, after a step on random gradients."""
    optimizer = make_optimizer(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


@pytest.fixture
def refused(tmp_path):
    """refused(path, model, *parts, optimizer): loading raises a ValueError with these parts, and changes nothing."""

    def check(path, model, *parts, optimizer=None):
        before = bits(model, optimizer)
        with pytest.raises(ValueError) as error:
            load_checkpoint(path, model, optimizer)
        assert same(before, bits(model, optimizer))
        for part in (str(path), *parts):
            assert part in str(error.value), str(error.value)

    return check


# ---- round trips


@pytest.mark.parametrize("fields", [dict(), dict(n_layers=2), dict(injection="parcae", attn_type="gqa", lora_rank=0)])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_model_comes_back_bit_for_bit(build, tmp_path, suffix, fields):
    path, model = tmp_path / f"model.{suffix}", build(1, **fields)
    if not fields:
        model.recurrent.block.ffn.router_bias += 0.125
    save_checkpoint(str(path), model, step=7)
    other = build(2, **fields)
    assert load_checkpoint(path, other) == 7
    state = torch.get_rng_state()
    rebuilt = load_model(path)
    assert torch.equal(state, torch.get_rng_state())
    assert type(rebuilt) is type(model) and rebuilt.cfg == model.cfg
    for copy in (other, rebuilt):
        assert same(bits(model), bits(copy)) and copy.head.weight is copy.embed.weight
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("fields", [dict(h0="noise", dropout=0.1), dict(n_layers=1)], ids=["looped", "dense"])
def test_training_resumes_bit_for_bit(build, tmp_path, fields):
    data, path = Batches(corpus().train, 2, 16, seed=5), tmp_path / "run.pt"
    whole, part = build(1, **fields), build(1, **fields)
    optimizer, first = make_optimizer(whole), make_optimizer(part)
    together = [record[:4] for record in train(whole, data, 4, optimizer=optimizer)]
    for record in train(part, data, 4, optimizer=first):
        if record.step == 2:
            save_checkpoint(path, part, first, record.step)
            break
    resumed = build(2, **fields)
    second = make_optimizer(resumed)
    start = load_checkpoint(path, resumed, second)
    assert start == 2
    assert [record[:4] for record in train(resumed, data, 4, optimizer=second, start=start)] == together[2:]
    assert same(bits(whole, optimizer), bits(resumed, second))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bfloat16_models(build, tmp_path, suffix):
    path, model = tmp_path / f"low.{suffix}", build(1).to(torch.bfloat16)
    save_checkpoint(path, model)
    rebuilt, wide = load_model(path), build(2)
    assert same(bits(model), bits(rebuilt))
    load_checkpoint(path, wide)
    assert wide.embed.weight.dtype == torch.float32
    assert same(bits(wide.to(torch.bfloat16)), bits(model))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_plain_state_dicts(build, tmp_path, suffix):
    model, other, path = build(1), build(2), tmp_path / f"plain.{suffix}"
    state = model.state_dict()
    if suffix == "pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file({key: value.clone() for key, value in state.items()}, path)
    assert load_checkpoint(path, other) == 0
    assert same(bits(model), bits(other))
    with pytest.raises(ValueError, match="without configuration"):
        load_model(path)


def test_a_state_dict_that_went_through_bfloat16(build, tmp_path):
    """open-mythos' `.to(torch.bfloat16)` makes the tables real."""
    model, other, path = build(1), build(2), tmp_path / "low.pt"
    state = {key: value.real if value.is_complex() else value for key, value in model.state_dict().items()}
    torch.save({key: value.to(torch.bfloat16) for key, value in state.items()}, path)
    tables = other.freqs_cis_mla.clone()
    load_checkpoint(path, other)
    assert torch.equal(other.freqs_cis_mla, tables) and other.freqs_cis_mla.is_complex()
    assert same(bits(other.to(torch.bfloat16)), bits(model.to(torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_of_open_mythos(build, tmp_path, upstream, dtype):
    model, path = build(), tmp_path / "theirs.pt"
    names = {field.name for field in dataclasses.fields(upstream.MythosConfig)}
    cfg = {key: value for key, value in dataclasses.asdict(model.cfg).items() if key in names}
    theirs = upstream.OpenMythos(upstream.MythosConfig(**cfg))
    want = {name: p.detach().clone().to(dtype).float() for name, p in theirs.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex tables are cast to real numbers
        torch.save(theirs.to(dtype).state_dict(), path)
    assert load_checkpoint(path, model) == 0
    assert same(want, dict(model.named_parameters()))


def test_a_state_dict_without_tables_or_tied_copy(build, tmp_path):
    model, path = build(1), tmp_path / "lean.pt"
    for left_out in ("head.weight", "embed.weight"):
        other = build(2)
        torch.save({k: v for k, v in model.state_dict().items() if k != left_out and "freqs" not in k}, path)
        load_checkpoint(path, other)
        assert same(bits(model), bits(other))


def test_safetensors_holds_every_weight_once(build, tmp_path):
    model, path = build(1), tmp_path / "m.safetensors"
    save_checkpoint(path, model)
    held = safetensors.torch.load_file(path)
    assert held.keys() == model.state_dict().keys() - {"head.weight", "freqs_cis", "freqs_cis_mla"}


def test_another_seed_of_the_same_shape_loads_over_gradients_and_training(build, tmp_path):
    model, other, path = build(1), build(2), tmp_path / "m.pt"
    optimizer, theirs = stepped(model), stepped(other)
    save_checkpoint(path, model, optimizer, 3)
    load_checkpoint(path, other)  # the optimizer in the file need not be loaded
    assert same(bits(model), bits(other)) and not same(bits(model, optimizer), bits(other, theirs))
    load_checkpoint(path, other, theirs)
    assert same(bits(model, optimizer), bits(other, theirs))


# ---- writing


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failing_write_leaves_the_old_file(build, tmp_path, suffix, monkeypatch):
    path = tmp_path / f"m.{suffix}"
    save_checkpoint(path, build(1))
    old = path.read_bytes()

    def half(content, to, *_):
        with to if hasattr(to, "write") else open(to, "wb") as file:  # safetensors gets a path
            file.write(old[: len(old) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, build(2))
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_whoever_is_reading_the_old_file_goes_on_reading_it(build, tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    save_checkpoint(path, build(1))
    old = path.read_bytes()
    with open(path, "rb") as reader:
        save_checkpoint(path, build(2))
        assert reader.read() == old != path.read_bytes()


def test_save_checks_its_arguments(build, tmp_path):
    model = build()
    for arguments, message in [
        ((tmp_path / "m.pt", torch.nn.Linear(2, 2)), "model: got Linear"),
        ((tmp_path / "m.pt", model, None, -1), "step = -1"),
        ((tmp_path / "m.pt", model, make_optimizer(build())), "optimizer: .* are not the model's"),
        ((tmp_path / "m.safetensors", model, make_optimizer(model)), "optimizer: .*holds weights alone"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_checkpoint(*arguments)
    assert os.listdir(tmp_path) == []


def test_without_safetensors(build, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: save_checkpoint(tmp_path / "m.safetensors", build()), lambda: load_model("m.safetensors")):
        with pytest.raises(ImportError, match="pip install safetensors"):
            call()
    save_checkpoint(tmp_path / "m.pt", build())


# ---- damaged and foreign files


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_truncation_is_refused(build, tmp_path, suffix, refused):
    path, model = tmp_path / f"m.{suffix}", build(2)
    save_checkpoint(path, build(1))
    whole = path.read_bytes()
    for length in [0, 8, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path, model)
        with pytest.raises(ValueError):
            load_model(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_flipped_bit_never_loads_other_numbers(build, tmp_path, suffix):
    """A flip that goes unnoticed (in padding, in dates inside a zip file) leaves all weights right."""
    path, source, model = tmp_path / f"m.{suffix}", build(1), build(2)
    save_checkpoint(path, source)
    whole, want, before = path.read_bytes(), bits(source), bits(model)
    places = random.Random(0).sample(range(len(whole)), 24)
    noticed = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            load_checkpoint(path, model)
            assert same(bits(model), want), place
            model = build(2)
        except ValueError as error:
            assert str(path) in str(error) and same(bits(model), before), place
            noticed += 1
    assert noticed >= 12


class Bomb:
    def __reduce__(self):
        return (print, ("code in a file was run",))


def foreign(path, name):
    if name == "garbage":
        path.write_bytes(random.Random(1).randbytes(5000))
    elif name == "text":
        path.write_text("{}")
    elif name == "pickle":
        path.write_bytes(pickle.dumps(Bomb(), protocol=2))
    elif name == "code":
        torch.save({"weight": Bomb()}, path)
    elif name == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.txt", "hello")
    elif name == "tensor":
        torch.save(torch.zeros(3), path)
    elif name == "empty dict":
        torch.save({}, path)
    elif name == "other dict":
        torch.save({"model": {"w": torch.zeros(3)}, "epoch": 3}, path)
    elif name == "number keys":
        torch.save({1: torch.zeros(3)}, path)
    elif name == "sparse":
        torch.save({"embed.weight": torch.eye(3).to_sparse()}, path)
    elif name == "meta":
        torch.save({"embed.weight": torch.empty(256, 32, device="meta")}, path)


@pytest.mark.parametrize(
    "name, says",
    [
        ("garbage", "cannot be read"),
        ("text", "cannot be read"),
        ("pickle", "cannot be read"),
        ("code", "cannot be read"),
        ("zip", "cannot be read"),
        ("tensor", "holds a Tensor"),
        ("empty dict", "holds no weights"),
        ("other dict", "'model' is a dict"),
        ("number keys", "1 is a Tensor"),
        ("sparse", "expected a dense tensor"),
        ("meta", "on meta"),
    ],
)
def test_foreign_files_are_refused(build, tmp_path, refused, capsys, name, says):
    path = tmp_path / "m.pt"
    foreign(path, name)
    refused(path, build(), says)
    assert capsys.readouterr().out == ""


def test_a_missing_file_is_missing(build, tmp_path):
    for suffix in SUFFIXES:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load_checkpoint(tmp_path / f"nowhere.{suffix}", build())


# ---- files that fit another model


@pytest.fixture(params=SUFFIXES)
def edited(request, build, tmp_path):
    """edited(change): the path of a file whose weights `change` has edited."""

    def write(change):
        path = tmp_path / f"m.{request.param}"
        weights = {key: value.clone() for key, value in build(1).state_dict().items()}
        change(weights)
        (torch.save if request.param == "pt" else safetensors.torch.save_file)(weights, path)
        return path

    return write


LAST = "norm.weight"  # the last key but one: loading key by key would have changed most of the model by then


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda w: w.pop(LAST), "norm.weight: missing, expected float32 (32,)"),
        (lambda w: (w.pop("embed.weight"), w.pop("head.weight")), "head.weight: missing"),
        (lambda w: w.update({"extra.weight": torch.zeros(2)}), "extra.weight: float32 (2,) in the file, expected no"),
        (lambda w: w.update({LAST: torch.zeros(33)}), "norm.weight: float32 (33,) in the file, expected float32 (32,)"),
        (lambda w: w.update({LAST: torch.zeros(1)}), "norm.weight: float32 (1,) in the file, expected float32 (32,)"),
        (lambda w: w.update({LAST: torch.zeros(32, dtype=torch.int64)}), "norm.weight: int64 (32,) in the file"),
        (lambda w: w.update({"head.weight": torch.zeros(256, 32)}), "head.weight differs from embed.weight"),
        (lambda w: w.update({"head.weight": w["head.weight"].double()}), "head.weight differs from embed.weight"),
        (lambda w: w.update(freqs_cis=w["freqs_cis"][:9].clone()), "freqs_cis: complex64 (9, 8) in the file"),
        (lambda w: w.update(freqs_cis=w["freqs_cis"].flip(1).clone()), "freqs_cis: other angles"),
        (lambda w: w.update(freqs_cis=w["freqs_cis"].flip(1).real.clone()), "freqs_cis: other angles"),
    ],
)
def test_weights_that_do_not_fit(build, edited, refused, change, says):
    refused(edited(change), build(2), says)


def test_many_misfits_are_one_short_error(build, edited, refused):
    path = edited(lambda weights: [weights.pop(key) for key in list(weights) if "norm" in key])
    model = build()
    missing = sum("norm" in key for key in model.state_dict())
    refused(path, model, "missing", f"and {missing - 5} more")


def test_a_plain_file_of_another_rope_theta(build, tmp_path, refused):
    path = tmp_path / "m.pt"
    torch.save(build(1, rope_theta=10000.0).state_dict(), path)
    refused(path, build(), "freqs_cis: other angles than the model's, expected those of its rope_theta")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_another_configuration(build, tmp_path, refused, suffix):
    path = tmp_path / f"m.{suffix}"
    save_checkpoint(path, build(1))
    refused(path, build(dim=64, act_threshold=0.5), "config.dim is 32, expected the model's 64", "config.act_threshold")
    refused(path, build(halting="off"), "config.halting is 'evolve', expected the model's 'off'")
    refused(path, build(n_layers=1), "of kind OpenMythos, expected DenseTransformer")


HEADS = [
    (dict(version=2), "version is 2, expected 1"),
    (dict(kind="Mamba"), "kind is 'Mamba', expected one of OpenMythos, DenseTransformer"),
    (dict(step=-1), "step is -1"),
    (dict(step="3"), "step is '3'"),
    (dict(config=None), "config is a NoneType"),
    (dict(config={"dim": 32, "depth": 3}), "config: MythosConfig.__init__() got an unexpected"),
    (dict(config={"dim": -3}), "config: MythosConfig.dim = -3"),
]


ENTRIES = [*HEADS, (dict(optimizer=[]), "optimizer is a list"), (dict(model=None), "holds no weights")]


@pytest.mark.parametrize("change, says", ENTRIES)
def test_entries_that_make_no_sense(build, tmp_path, refused, change, says):
    path = tmp_path / "m.pt"
    save_checkpoint(path, build(1))
    torch.save({**torch.load(path), **change}, path)
    refused(path, build(2), says)


@pytest.mark.parametrize("change, says", HEADS)
def test_metadata_that_makes_no_sense(build, tmp_path, refused, change, says):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, build(1))
    with safetensors.safe_open(path, "pt") as file:
        head = json.loads(file.metadata()["openmythos"])
        names = file.keys()
        weights = {name: file.get_tensor(name).clone() for name in names}
    safetensors.torch.save_file(weights, path, {"openmythos": json.dumps({**head, **change})})
    refused(path, build(2), says)


def test_a_config_of_an_older_version_has_the_defaults(build, tmp_path):
    path, model = tmp_path / "m.pt", build(1)
    save_checkpoint(path, model)
    content = torch.load(path)
    del content["config"]["halting"], content["config"]["ffn_dim"]
    torch.save(content, path)
    assert load_model(path).cfg == model.cfg


def test_models_that_cannot_be_loaded_into(build, tmp_path):
    path = tmp_path / "m.pt"
    save_checkpoint(path, build(1))
    with pytest.raises(ValueError, match="model: got Linear, expected OpenMythos or DenseTransformer"):
        load_checkpoint(path, torch.nn.Linear(2, 2))
    with torch.device("meta"):
        model = build()
    with pytest.raises(ValueError, match="meta device"):
        load_checkpoint(path, model)


# ---- optimizers that do not fit


def broken(content, name):
    saved = content["optimizer"]
    state = saved["state"]
    if name == "none":
        content["optimizer"] = None
    elif name == "class":
        saved["class"] = "SGD"
    elif name == "names":
        saved["parameters"][1][0] = "some.weight"
    elif name == "groups":
        saved["parameters"] = saved["parameters"][:1]
    elif name == "shape":
        state["state"][3]["exp_avg"] = torch.zeros(2)
    elif name == "step":
        state["state"][3]["step"] = torch.zeros(2)
    elif name == "no groups":
        del state["param_groups"]
    elif name == "fewer":
        state["param_groups"][0]["params"].pop()
    elif name == "unknown":
        state["state"][999] = {"exp_avg": torch.zeros(2)}
    elif name == "no state":
        saved["state"] = 3
    elif name == "meta":
        state["state"][3]["exp_avg"] = state["state"][3]["exp_avg"].to("meta")


@pytest.mark.parametrize(
    "name, says",
    [
        ("none", "holds no state of one, expected that of AdamW"),
        ("class", "state of 'SGD', expected that of AdamW"),
        ("names", "hold other parameters"),
        ("groups", "hold other parameters"),
        ("shape", "exp_avg of "),
        ("step", "step of "),
        ("no groups", "expected the state_dict of an optimizer"),
        ("fewer", "expected the state_dict of an optimizer"),
        ("unknown", "expected the state_dict of an optimizer"),
        ("no state", "expected the state_dict of an optimizer"),
        ("meta", "exp_avg of "),
    ],
)
def test_optimizers_that_do_not_fit(build, tmp_path, refused, name, says):
    path, model, other = tmp_path / "m.pt", build(1), build(2)
    save_checkpoint(path, model, stepped(model), 1)
    content = torch.load(path)
    broken(content, name)
    torch.save(content, path)
    refused(path, other, "optimizer: ", says, optimizer=stepped(other))
    load_checkpoint(path, other)  # the weights are fine


def test_a_wrong_model_does_not_get_its_optimizer_either(build, tmp_path, refused):
    path, model, other = tmp_path / "m.pt", build(1), build(2)
    save_checkpoint(path, model, stepped(model), 1)
    content = torch.load(path)
    content["model"].pop(LAST)
    torch.save(content, path)
    refused(path, other, "norm.weight: missing", optimizer=stepped(other))


def test_formats_are_pinned(build, tmp_path):
    """Files outlive versions: whoever changes the format needs a reader for the old one."""
    path, model = tmp_path / "m.pt", build(1)
    save_checkpoint(path, model, stepped(model), 3)
    content = torch.load(path, weights_only=True)
    assert set(content) == {"format", "version", "kind", "config", "model", "optimizer", "step"}
    assert (content["format"], content["version"]) == ("openmythos-checkpoint", 1) == (module.FORMAT, module.VERSION)
    assert set(content["optimizer"]) == {"class", "parameters", "state"}
    assert content["model"].keys() == model.state_dict().keys() and content["step"] == 3
