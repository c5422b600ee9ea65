import math

import pytest
import torch
import torch.nn.functional as F

from openmythos import LTIInjection
from openmythos.injection import AddInjection, ConcatInjection, ParcaeInjection, ResidualInjection, loop_index_embedding
from tests.kit.tiny import enliven, relative, tiny_model, tokens

VARIANTS = [LTIInjection, ResidualInjection, ParcaeInjection, ConcatInjection, AddInjection]
NAMES = ["mythos", "residual", "parcae", "concat", "add"]


def identity(x):
    return x


@pytest.mark.parametrize("dim", [0, 1, 2, 3, 8, 9])
def test_loop_index_embedding(dim):
    for t in (0, 1, 17):
        angles = [t * 10000.0 ** (-2 * k / dim) for k in range((dim + 1) // 2)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert loop_index_embedding(t, dim, dtype=torch.float64).tolist() == pytest.approx(expected[:dim], abs=1e-12)


def draws(dim=16):
    return (torch.randn(2, 3, dim, dtype=torch.float64) for _ in range(3))


def test_lti_update_by_definition():
    injection = enliven(LTIInjection(16)).double()
    h, e, f = draws()
    a = torch.exp(-torch.exp(injection.log_dt + injection.log_A))
    assert relative(injection.update(h, e, None, f), a * h + injection.B * e + f) < 1e-12
    embedded = h.clone()
    embedded[..., :2] += torch.tensor([math.sin(3.0), math.cos(3.0)], dtype=torch.float64)
    assert relative(injection.enter(h, e, 3, identity), embedded + e) < 1e-12


def test_residual_update_takes_what_the_block_added():
    injection = enliven(ResidualInjection(16)).double()
    h, e, f = draws()
    u = injection.enter(h, e, 1, identity)
    assert relative(injection.update(h, e, u, f), injection.get_A() * h + injection.B * e + f - u) < 1e-12


def test_parcae_by_definition():
    fresh = ParcaeInjection(16)
    h, e, f = draws()
    assert fresh.spectral_radius() == pytest.approx(0.447, abs=1e-6)
    into = fresh.double().prepare(e, identity)
    assert relative(fresh.enter(h, into, 0, identity), 0.447 * h - math.log(0.447) * e) < 1e-6
    injection = enliven(ParcaeInjection(16)).double()
    dt = F.softplus(injection.dt_bias)
    a = torch.exp(-dt * torch.exp(injection.A_log))
    assert (
        relative(injection.enter(h, injection.prepare(e, identity), 5, identity), a * h + dt * (e @ injection.B.T))
        < 1e-12
    )
    assert injection.update(h, e, None, f) is f
    assert relative(injection.readout(h), h @ injection.C.T) < 1e-12


def test_concat_and_add_by_definition():
    concat = enliven(ConcatInjection(16)).double()
    h, e, f = draws()
    w = concat.W.weight
    assert relative(concat.enter(h, e, 2, identity), h @ w[:, :16].T + e @ w[:, 16:].T) < 1e-12
    assert relative(AddInjection(16).enter(h, e, 2, identity), h + e) == 0
    assert concat.update(h, e, None, f) is f


@pytest.mark.parametrize("variant", VARIANTS)
def test_spectral_radius_is_that_of_the_linear_part(variant):
    """The largest eigenvalue of the Jacobian, for a block that passes u through or adds nothing."""
    injection = enliven(variant(8)).double()
    lti = isinstance(injection, LTIInjection)

    def linear(h):
        zero = torch.zeros_like(h)
        u = injection.enter(h, zero, 0, identity)
        block_out = (u if isinstance(injection, ResidualInjection) else zero) if lti else u
        return injection.update(h, zero, u, block_out)

    jacobian = torch.autograd.functional.jacobian(linear, torch.zeros(8, dtype=torch.float64))
    assert injection.spectral_radius() == pytest.approx(torch.linalg.eigvals(jacobian).abs().max().item(), rel=1e-6)


@pytest.mark.parametrize("value", [-1e30, -25.0, 0.0, 25.0, 1e30])
def test_stable_by_construction(value):
    for variant, names in ((LTIInjection, ("log_A", "log_dt")), (ParcaeInjection, ("A_log", "dt_bias"))):
        for name in names:
            injection = variant(4)
            torch.nn.init.constant_(getattr(injection, name), value)
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                assert 0 <= injection.to(dtype).spectral_radius() < 1, (variant, name, dtype)


def test_a_slow_decay_survives_bfloat16():
    injection = LTIInjection(4).bfloat16()
    torch.nn.init.constant_(injection.log_A, -8.0)  # A = 1 - 3.4e-4, which bfloat16 would round to 1
    assert injection.get_A().dtype == torch.float32 and (injection.get_A() < 0.9998).all()


@pytest.mark.parametrize("injection", NAMES)
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_every_variant_trains_and_decodes(injection, kind):
    model = tiny_model(injection=injection, attn_type=kind, halting="off" if injection == "add" else "evolve")
    ids = tokens(2, 6)
    logits = model(ids)
    logits.logsumexp(-1).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None or ".act." in name, name
        assert p.grad is None or p.grad.isfinite().all(), name
        if name.startswith("recurrent.injection"):
            assert p.grad.any(), name
    cache = {}
    with torch.no_grad():
        steps = [model(ids[:, t : t + 1], kv_cache=cache, start_pos=t) for t in range(6)]
    assert relative(torch.cat(steps, 1), logits) < 1e-5


@pytest.mark.parametrize("injection", NAMES)
def test_the_state_stays_float32_under_autocast(injection):
    model = tiny_model(injection=injection)
    states = []
    model.recurrent.act.register_forward_pre_hook(lambda module, args: states.append(args[0].dtype))
    model.recurrent.register_forward_hook(lambda module, args, out: states.append(out.dtype))
    expected = model(tokens(2, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens(2, 6))
    assert set(states) == {torch.float32}
    assert relative(logits, expected) < 0.1
