"""Numbers that no caller should give: positions beyond 32 bits, lengths past the end of keys or of a cache."""

import contextlib

import pytest
import torch

from openmythos import debug
from openmythos_kernels.ops import mla
from openmythos_kernels.ops.mla import formula
from openmythos_kernels.ops.mla.decode import check_layer
from openmythos_kernels.runtime import backends
from openmythos_kernels.verify.check import run
from openmythos_kernels.verify.specs import mla_attention as specs

CPU = torch.device("cpu")
BY_NAME = {d.name: d for d in specs.SPECIFICATIONS}
T, S = 5, 20
FAR = {2**31 - 1: S, 2**31: S, 2**32 + 3: S, 2**62: S, 2**63 - 1: S}  # start -> one that means the same
FAR |= {-(2**31) - 7: -T, -(2**32) + 3: -T, -(2**63): -T}
INTERPRETER = pytest.mark.parametrize("triton_mode", ["interpreter"])


def inputs_of(name, **sizes):
    d = BY_NAME[name]
    return d.make({**next(iter(d.cases.values())), **sizes}, torch.float32, CPU, torch.Generator().manual_seed(0))


def attended(start, backend):
    """Outputs and gradients."""
    d, inputs = BY_NAME["mla_attention"], inputs_of("mla_attention", tokens=T, keys=S, start=[start, 3])
    ones = {"out": torch.ones(2, T, 2, 16)}
    with backends.forcing(backend) if backend else contextlib.nullcontext():
        return run(d.fast, inputs, d.differentiable, ones)


@pytest.mark.parametrize("start", FAR)
def test_starts_beyond_32_bits(start, needs_extension):
    got, want = attended(start, ""), attended(FAR[start], "")
    assert want["dkv"].any() and all(torch.equal(got[name], want[name]) for name in want)


@INTERPRETER
@pytest.mark.parametrize("start", FAR)
def test_starts_beyond_32_bits_in_triton(triton_mode, start):
    got, want = attended(start, "triton"), attended(FAR[start], "triton")
    assert want["dkv"].any() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("start", FAR)
def test_the_formula_takes_them_too(start):
    inputs = inputs_of("mla_attention", tokens=T, keys=S, start=start)
    want = formula.attention_output(**{**inputs, "start": torch.full((2,), FAR[start])})
    assert torch.equal(formula.attention_output(**inputs), want)


@INTERPRETER
@pytest.mark.parametrize("held, nearest", [(S + 1, S), (2**31 + 2, S), (2**32 + 2, S), (-1, 0), (-(2**32) + 2, 0)])
def test_lengths_of_keys_are_clamped_on_a_gpu(triton_mode, held, nearest):
    """The interpreter checks every access; the keys are followed by others of the same storage."""
    d, results = BY_NAME["mla_attention"], []
    for n in (held, nearest):
        inputs = inputs_of("mla_attention", tokens=T, keys=S, start=S - T)
        inputs |= {"key_lengths": torch.tensor([n, S])}
        with backends.forcing("triton"):
            results.append(run(d.fast, inputs, d.differentiable, {"out": torch.ones(2, T, 2, 16)}))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("held", [S + 1, -1])
def test_lengths_of_keys_are_refused_on_a_cpu(held, needs_extension):
    inputs = inputs_of("mla_attention", tokens=T, keys=S, start=0)
    with pytest.raises(ValueError, match=rf"key_lengths: got {held} at \[1\], must be in \[0, 20\]"):
        mla.attention(**{**inputs, "key_lengths": torch.tensor([S, held])})


def cache(page):
    """A cache whose rows hold up to 8 tokens, dense or in pages of 4."""
    sizes = dict(rows=2, tokens=2, latent=16, rope=4, capacity=8, held=6, page=page)
    if not page:
        del sizes["page"]
    d = BY_NAME["mla_append"]
    return d.make(sizes, torch.float32, CPU, torch.Generator().manual_seed(0))


@INTERPRETER
@pytest.mark.parametrize("page", [0, 4])
@pytest.mark.parametrize("first", [8, 2**31, 2**32, 2**62, -3, -(2**32)])
def test_tokens_without_room_are_not_written_on_a_gpu(triton_mode, first, page):
    """The first row's; the other row's are."""
    inputs = cache(page)
    inputs["lengths"] = torch.tensor([first, 6])
    with backends.forcing("triton"):
        got = BY_NAME["mla_append"].fast(**inputs)
    want = BY_NAME["mla_append"].reference(**{**inputs, "lengths": torch.tensor([6, 6])})
    for name in got:
        row = 0 if inputs["table"] is None else inputs["table"][0].long()
        want[name][row] = inputs[name][row]
        torch.testing.assert_close(got[name], want[name])


@INTERPRETER
@pytest.mark.parametrize("page", [0, 4])
@pytest.mark.parametrize("length, nearest", [(9, 8), (2**31 + 1, 8), (2**32 + 1, 8), (-1, 0), (-(2**32) + 1, 0)])
def test_decoding_reads_no_more_than_the_cache_on_a_gpu(triton_mode, length, nearest, page):
    caches = cache(page)
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, 3, 16, generator=g), torch.randn(2, 3, 4, generator=g)
    results = []
    for n in (length, nearest):
        with backends.forcing("triton"):
            rows = caches["latent_cache"], caches["rope_cache"], torch.tensor([n, 6]), caches["table"]
            results.append(mla.attend_latent(*q, *rows, scale=0.3))
    assert torch.equal(*results) and results[0][1].any()


# ---- under the debug switch, on any device ----


@pytest.fixture
def checking(monkeypatch):
    monkeypatch.setattr(debug, "on", True)


@pytest.mark.parametrize("page", [0, 4])
@pytest.mark.parametrize("length", [7, 2**40, -1])
def test_append_checks_lengths(length, page, checking):
    inputs = cache(page)
    inputs["lengths"] = torch.tensor([6, length])
    with pytest.raises(ValueError, match=rf"^lengths: got {length} at \[1\], must be in \[0, 6\]"):
        mla.append(**inputs)


@pytest.mark.parametrize("page", [0, 4])
def test_attend_latent_checks_lengths(page, checking):
    caches = cache(page)
    rows = caches["latent_cache"], caches["rope_cache"], torch.tensor([9, 0]), caches["table"]
    with pytest.raises(ValueError, match=r"^lengths: got 9 at \[0\], must be in \[0, 8\]"):
        mla.attend_latent(torch.zeros(2, 3, 16), torch.zeros(2, 3, 4), *rows, scale=0.3)


@INTERPRETER
def test_only_pages_with_tokens_are_checked(triton_mode, checking):
    inputs = cache(4)
    pages = len(inputs["latent_cache"])
    inputs["lengths"] = torch.tensor([0, 6])
    inputs["table"][0, 1] = 99  # two tokens of the first row stay in its first page
    with backends.forcing("triton"):
        mla.append(**inputs)
    inputs["lengths"][0] = 3
    with pytest.raises(ValueError, match=rf"^table: got 99 at \[0, 1\], must be in \[0, {pages}\) where"):
        mla.append(**inputs)


def test_attention_checks_lengths(checking):
    inputs = inputs_of("mla_attention", tokens=T, keys=S, start=0)
    with pytest.raises(ValueError, match=r"^key_lengths: got 21 at \[1\], must be in \[0, 20\]"):
        mla.attention(**{**inputs, "key_lengths": torch.tensor([S, S + 1])})


@pytest.mark.parametrize(
    "name, wrong, place",
    [
        ("offset", [1, 2, 3], 0),
        ("offset", [0, 4, 3], 1),
        ("offset", [0, 2, 2], 2),
        ("offset", [0, -1, 3], 1),
        ("position", [0, 4, 2], 1),
        ("position", [-1, 3, 2], 0),
        ("position", [3, 3, 2], 1),
        ("position", [3, 1, 2], 1),
    ],
)
def test_attention_of_rows_checks_what_the_cpu_checks(name, wrong, place, checking):
    g = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=g) for shape in ((3, 2, 5), (3, 2, 4), (2, 4, 2, 8), (2, 4, 4))]
    limits = {"position": torch.tensor([0, 3, 2]), "offset": torch.tensor([0, 2, 3])}
    with backends.forcing("reference"):
        assert mla.attention_rows(*draw, **limits)[0].shape == (3, 2, 3)
        with pytest.raises(ValueError, match=rf"^{name}: got {wrong[place]} at \[{place}\], must be"):
            mla.attention_rows(*draw, **{**limits, name: torch.tensor(wrong)})


def test_decode_checks_lengths(checking):
    """A CPU's kernel checks always; elsewhere this function does."""
    x, freqs = torch.zeros(2, 6), torch.zeros(2, 1, 2)
    caches = torch.zeros(2, 8, 4), torch.zeros(2, 8, 2)
    weights = [torch.zeros(*shape) for shape in ((3, 6), (3,), (1, 3), (2, 3), (6, 6), (4,), (2, 4), (6, 1))]
    check_layer(x, freqs, *caches, torch.tensor([0, 7]), weights, 1, 1, 2, 1)
    with pytest.raises(ValueError, match=r"^lengths: got 8 at \[0\], must be in \[0, 8\)"):
        check_layer(x, freqs, *caches, torch.tensor([8, 7]), weights, 1, 1, 2, 1)
