import pytest
import torch

from openmythos import ACTHalting, LoRAAdapter
from openmythos.attention import attend
from tests.kit.tiny import relative, tiny_model, tokens


def test_lora_by_definition():
    lora = LoRAAdapter(8, 3, 4)
    x = torch.randn(2, 5, 8)
    for t, row in [(0, 0), (3, 3), (4, 3), (99, 3)]:  # past the table: its last row
        expected = (x @ lora.down.weight.T) @ torch.diag(lora.scale.weight[row]) @ lora.B
        torch.testing.assert_close(lora(x, t), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_halting_probability_is_wide(dtype):
    act = ACTHalting(64).to(dtype)
    h = torch.randn(2, 5, 64).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p = act(h)
    expected = torch.sigmoid(h.double() @ act.halt.weight[0].double() + act.halt.bias.double())
    assert p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert p.shape == (2, 5) and relative(p, expected) < 1e-6


def record(model, ids, **options):
    """(recurrent output, ponder cost, state and halting probability of every loop)."""
    seen = []
    hook = model.recurrent.act.register_forward_hook(lambda module, args, p: seen.append((args[0], p)))
    out = []
    outer = model.recurrent.register_forward_hook(lambda module, args, result: out.append(result))
    model(ids, return_ponder=True, **options)
    hook.remove()
    outer.remove()
    return *out[0], seen


@pytest.mark.parametrize("remainder", ["drop", "last"])
@pytest.mark.parametrize("halting", ["evolve", "freeze"])
@pytest.mark.parametrize("threshold", [1e-6, 0.6, 0.99, 1.0])
def test_act_position_by_position(threshold, halting, remainder):
    """The weighted sum and the ponder cost N + R (Graves, 2016), recomputed position by position."""
    model = tiny_model(act_threshold=threshold, halting=halting, act_remainder=remainder, max_loop_iters=5).double()
    out, ponder, seen = record(model, tokens(2, 6))
    depths = set()
    for b in range(2):
        for i in range(6):
            cumulative_p, expected, weights = 0.0, torch.zeros(24, dtype=torch.float64), 0.0
            for t, (h, p) in enumerate(seen):
                p = p[b, i].item()
                halts = cumulative_p + p >= threshold
                weight = max(1 - cumulative_p, 0) if halts or (t == 4 and remainder == "last") else p
                expected += weight * h[b, i]
                weights += weight
                cost = t + 1 + (1 - cumulative_p)
                cumulative_p += p
                if halts:
                    break
            depths.add(t)
            assert relative(out[b, i], expected) < 1e-12
            assert ponder[b, i].item() == pytest.approx(cost, abs=1e-12)
            if remainder == "last" or halts:
                assert weights == pytest.approx(1, abs=1e-12)
    if threshold in (0.6, 0.99):
        assert len(depths) > 1  # positions halt in different loops
    if threshold == 1e-6:
        assert len(seen) == 1  # and the loop stops with the last of them


def test_ponder_cost_has_a_gradient_and_needs_act():
    model = tiny_model(act_threshold=1.0)
    _, ponder = model(tokens(1, 4), return_ponder=True)
    ponder.sum().backward()
    assert model.recurrent.act.halt.weight.grad.any()
    with pytest.raises(ValueError, match=r'return_ponder = True.*halting="off"'):
        tiny_model(halting="off")(tokens(1, 4), return_ponder=True)


def with_halting(halting: str, bias: float, weight: float, **fields):
    model = tiny_model(halting=halting, max_loop_iters=6, **fields)
    with torch.no_grad():
        model.recurrent.act.halt.weight.mul_(weight)
        model.recurrent.act.halt.bias.fill_(bias)
    return model


@pytest.mark.parametrize("kind", ["mla", "gqa"])
@pytest.mark.parametrize("bias, weight", [(-30.0, 0.0), (-0.5, 0.0), (30.0, 0.0)])
@pytest.mark.parametrize("core_layers", [1, 2])
def test_freeze_equals_evolve_where_all_halt_together(kind, bias, weight, core_layers):
    """... or if nothing halts (bias -30): no position then reads a key that differs between the two."""
    ids = tokens(2, 6)
    models = [with_halting(h, bias, weight, attn_type=kind, core_layers=core_layers) for h in ("evolve", "freeze")]
    evolve, freeze = (model(ids) for model in models)
    assert relative(freeze, evolve) < 1e-6
    for logits in (evolve, freeze):
        logits.logsumexp(-1).mean().backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-3, msg=name)


def test_freeze_differs_where_halting_differs():
    ids = tokens(2, 6)
    assert relative(tiny_model(halting="freeze")(ids), tiny_model(halting="evolve")(ids)) > 1e-3


def test_freeze_by_definition():
    """Position by position: i in loop t reads the keys that j made in loop min(t, tau_j)."""
    model = tiny_model(halting="freeze", prelude_layers=0, max_loop_iters=5, act_threshold=0.9).double()
    ids = tokens(1, 7)
    recurrent, block, attn = model.recurrent, model.recurrent.block, model.recurrent.block.attn
    made, tau, rows = {}, {}, []
    embedded = model.embed(ids)
    for i in range(7):
        e = h = embedded[:, i : i + 1]
        cumulative_p, out = 0.0, torch.zeros_like(h)
        for t in range(5):
            u = recurrent.injection.enter(h, e, t, recurrent.norm)
            x, freqs = block.attn_norm(u), model.freqs_cis_mla[i : i + 1]
            made[t, i] = attn.latent(x, freqs)
            keys = [made[min(t, tau.get(j, t)), j] for j in range(i + 1)]
            k, v = attn.expand(*(torch.cat(parts, dim=1) for parts in zip(*keys)))
            x = u + attn.wo(attend(attn.query(x, freqs), k, v, None, attn.attn_drop))
            f = x + block.ffn(block.ffn_norm(x))
            h = recurrent.injection(h, e, f + recurrent.lora(f, t))
            p = recurrent.act(h)[0, 0]
            halts = cumulative_p + p >= 0.9
            out = out + (1 - cumulative_p if halts else p) * h
            cumulative_p = cumulative_p + p
            if halts:
                break
        tau[i] = t
        rows.append(out)
    assert len(set(tau.values())) > 2
    seen = []
    recurrent.register_forward_hook(lambda module, args, result: seen.append(result))
    model(ids)
    assert relative(seen[0], torch.cat(rows, 1)) < 1e-12


@pytest.mark.parametrize("halting", ["evolve", "freeze"])
def test_leaving_early_changes_nothing(halting, monkeypatch):
    from openmythos import recurrence

    model = tiny_model(halt=0.02, halting=halting, act_threshold=0.9, max_loop_iters=6)
    ids = tokens(2, 5)
    _, _, seen = record(model, ids)
    assert 1 < len(seen) < 6
    early = model(ids)
    early.logsumexp(-1).mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(recurrence, "_free_to_exit", lambda h: False)
    assert len(record(model, ids)[2]) == 6
    late = model(ids)
    late.logsumexp(-1).mean().backward()
    assert torch.equal(early, late)
    for p, g in zip(model.parameters(), grads):
        torch.testing.assert_close(p.grad, g)


def test_without_act_the_last_state_is_the_output():
    model = tiny_model(halting="off")
    states, out = [], []
    model.recurrent.injection.register_forward_hook(lambda module, args, h: states.append(h))
    model.recurrent.register_forward_hook(lambda module, args, result: out.append(result))
    model(tokens(1, 4), n_loops=7)
    assert len(states) == 7 and torch.equal(out[0], states[-1])


@pytest.mark.parametrize("n_loops", [0, -1, 2.0, True, "3", torch.tensor(2.5)])
def test_bad_depths(n_loops):
    with pytest.raises(ValueError, match=r"n_loops = .*must be an integer >= 1, or None for the configured 4"):
        tiny_model()(tokens(1, 3), n_loops=n_loops)


def test_initial_states():
    ids = tokens(2, 6)
    entered = {}
    for h0 in ("e", "zeros", "noise"):
        model = tiny_model(h0=h0)
        model.recurrent.register_forward_pre_hook(lambda module, args, h0=h0: entered.__setitem__(h0, args[:2]))
        logits = model(ids)
        logits.sum().backward()
        assert logits.isfinite().all()
        assert torch.equal(model(ids), logits) == (h0 != "noise")
    assert torch.equal(*entered["e"])
    assert not entered["zeros"][0].any()
    noise = entered["noise"][0]
    assert noise.any() and noise.abs().max() <= 0.06
    wide = tiny_model(h0="noise").recurrent.initial_state(torch.zeros(40, 40, 24))
    assert 0.018 < wide.std() < 0.0205
