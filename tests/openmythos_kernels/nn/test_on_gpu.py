"""Fast modules on a GPU against the reference on the same GPU, and properties that only a GPU can show.

Heads have the sizes of real models, so that tensor cores are used. By PyTorch's default, float32 products do not use
TF32.
"""

import contextlib
import copy

import pytest
import torch

import openmythos
from openmythos import KVCache, MythosConfig, OpenMythos
from openmythos.attention import CausalMask
from openmythos.layers import rotary_table
from openmythos_kernels import accelerate, graphed_step
from openmythos_kernels.nn.thresholds import threshold
from openmythos_kernels.runtime import backends
from tests.kit.thresholds import set_threshold
from tests.kit.tiny import enliven, relative

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.usefixtures("always_recompute"),
]
SIZES = dict(
    vocab_size=128,
    dim=256,
    n_heads=4,
    max_seq_len=160,
    max_loop_iters=4,
    prelude_layers=1,
    coda_layers=1,
    kv_lora_rank=128,
    q_lora_rank=96,
    qk_rope_head_dim=32,
    qk_nope_head_dim=64,
    v_head_dim=64,
    n_experts=8,
    n_shared_experts=1,
    n_experts_per_tok=2,
    expert_dim=64,
    lora_rank=8,
)


def models(dtype=torch.float32, **fields):
    """The reference and its accelerated copy on the GPU; positions halt at different loops."""
    model = enliven(OpenMythos(MythosConfig(**{**SIZES, **fields})), halt=0.3).to("cuda", dtype)
    return model.eval(), accelerate(copy.deepcopy(model)).eval()


def ids(*shape, seed=0):
    return torch.randint(128, shape, generator=torch.Generator().manual_seed(seed)).cuda()


def loss_and_gradients(model, tokens):
    model.zero_grad(set_to_none=True)
    logits = model(tokens, n_loops=4)
    logits.float().logsumexp(-1).sin().sum().backward()
    return logits.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def apart(gradients, exact):
    """Relative distance of all gradients as one vector, since single gradients may be sums that almost cancel."""
    return relative(*(torch.cat([g.double().flatten() for g in of.values()]) for of in (gradients, exact)))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"halting": "off"},
        {"halting": "freeze"},
        {"injection": "residual"},
        {"injection": "parcae"},
        {"core_ffn": "dense"},
    ],
    ids=str,
)
def test_logits_and_gradients_in_float32(fields):
    reference, fast = models(**fields)
    truth, _ = models(torch.float64, **fields)
    tokens = ids(2, 70)
    (exact, exact_grads), (a, a_grads), (b, b_grads) = (loss_and_gradients(m, tokens) for m in (truth, reference, fast))
    assert relative(b, exact) <= 2 * relative(a, exact) + 1e-6
    # In float32 the layer uses PyTorch's fused attention, whose gradients had four times the error on an H200.
    assert apart(b_grads, exact_grads) <= 5 * apart(a_grads, exact_grads) + 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_without_routing(dtype):
    """With a dense core, since with experts a rounding error may route a token differently."""
    reference, fast = models(dtype, core_ffn="dense", halting="off")
    truth = models(torch.float64, core_ffn="dense", halting="off")[0]
    truth.load_state_dict(reference.state_dict())
    tokens = ids(2, 70)
    (exact, exact_grads), (a, a_grads), (b, b_grads) = (loss_and_gradients(m, tokens) for m in (truth, reference, fast))
    assert relative(b, exact) <= 2 * relative(a, exact) + 1e-3
    assert apart(b_grads, exact_grads) <= 2 * apart(a_grads, exact_grads) + 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("core", [dict(core_ffn="dense"), dict(n_experts=2)], ids=["dense", "all experts chosen"])
def test_autocast_without_routing(core, dtype):
    reference, fast = models(**core, halting="off")
    truth = copy.deepcopy(reference).double()
    tokens, found = ids(2, 70), []
    exact, exact_grads = loss_and_gradients(truth, tokens)
    for model in (reference, fast):
        with torch.autocast("cuda", dtype):
            logits, grads = loss_and_gradients(model, tokens)
        found.append((relative(logits, exact), apart(grads, exact_grads)))
    (a, a_grads), (b, b_grads) = found
    assert b <= 2 * a + 1e-3
    assert b_grads <= 2 * a_grads + 1e-2


@torch.no_grad()
def test_untrimmed_loops_end_when_no_position_runs():
    reference, fast = models()
    for model in (reference, fast):
        model.recurrent.act.halt.bias.fill_(30.0)  # every position halts in the first loop
    expected, fast.recurrent.trim, loops = reference(ids(2, 70), n_loops=16), False, []
    fast.recurrent.block.register_forward_hook(lambda *_: loops.append(1))
    assert relative(fast(ids(2, 70), n_loops=16), expected) < 1e-4
    assert len(loops) <= 1 + threshold("early_exit_lag_cuda") + 1


@torch.no_grad()
def test_generation_gives_the_references_tokens():
    reference, fast = models()
    prompt, found = ids(2, 33), []
    for model in (reference, fast):
        cache, step, made = KVCache(64), prompt, []
        for start in [0, *range(33, 60)]:
            step = model(step, n_loops=4, kv_cache=cache, start_pos=start)[:, -1:].argmax(-1)
            made.append(step)
        found.append(torch.cat(made, 1))
    assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_is_a_graph(dtype):
    """With ragged rows, a growing cache and a truncated cache, logits equal the eager model's."""
    _, fast = models(dtype, core_ffn="dense")
    prompt, more, caches = ids(2, 33), ids(2, 9, seed=1), [KVCache(38), KVCache(38)]
    for cache in caches:
        fast(prompt, n_loops=4, kv_cache=cache)
        cache.truncate([33, 20])
    decode = fast.decoder(caches[1], n_loops=4)
    for t in range(9):
        if t == 7:
            for cache in caches:
                cache.truncate([35, 22])
        step = more[:, t : t + 1]
        expected = fast(step, n_loops=4, kv_cache=caches[0], start_pos=caches[0].lengths)
        assert relative(decode(step), expected) < (1e-5 if dtype == torch.float32 else 2e-2)
        assert caches[0].lengths == caches[1].lengths
        assert t < 1 or t == 5 or decode._graph is not None
    assert not decode.refused


def test_generation_by_a_graph_gives_the_references_tokens():
    reference, fast = models()
    options = dict(max_new_tokens=24, n_loops=4, temperature=0)
    assert torch.equal(fast.generate(ids(2, 33), **options), reference.generate(ids(2, 33), **options))
    assert not fast.backend().reason


def test_autocast_computes_in_the_references_dtype():
    reference, fast = models(core_ffn="moe")
    x, results = torch.randn(1, 16, 256, device="cuda"), []
    for model in (reference, fast):
        with torch.autocast("cuda", torch.bfloat16):
            results.append(model.recurrent.block.ffn(x))
    assert relative(results[1], results[0]) < 0.02
    float32 = reference.recurrent.block.ffn(x)
    assert relative(results[1], float32) > 1e-4, "computed in float32: autocast had no effect"


@contextlib.contextmanager
def no_host_reads():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_experts_never_wait_for_the_device():
    _, fast = models()
    layer = fast.recurrent.block.ffn.train()
    for tokens in (1, 50):  # the first call may compile and synchronize
        x = torch.randn(1, tokens, 256, device="cuda", requires_grad=True)
        layer(x).sum().backward()
        with no_host_reads():
            layer(x).sum().backward()


@torch.no_grad()
def test_decoding_never_waits_for_the_device():
    _, fast = models()
    attention = fast.recurrent.block.attn
    table, cache = rotary_table(32, 64, 1e4).cuda(), KVCache(64)
    x = torch.randn(2, 40, 256, device="cuda")
    attention(x, table[:40], CausalMask(0, 40), cache, "layer")
    attention(x[:, :1], table[40:41], CausalMask(40, 1), cache, "layer")
    with no_host_reads():
        attention(x[:, :1], table[41:42], CausalMask(41, 1), cache, "layer")


@torch.no_grad()
def test_a_forward_of_fixed_depth_is_a_cuda_graph():
    reference, fast = models(halting="off")
    tokens = ids(1, 64)
    for _ in range(2):
        fast(tokens, n_loops=3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fast(tokens, n_loops=3)
    tokens.copy_(ids(1, 64, seed=1))
    graph.replay()
    torch.testing.assert_close(out, reference(tokens, n_loops=3), rtol=1e-3, atol=1e-3)


def test_compiled_block_equals_eager():
    _, fast = models(halting="off")
    tokens = ids(1, 64)
    expected = fast(tokens, n_loops=2)
    compiled = torch.compile(fast, fullgraph=True)
    torch.testing.assert_close(compiled(tokens, n_loops=2), expected, rtol=1e-3, atol=1e-3)


def test_gpu_kernels_run():
    _, fast = models()
    assert fast.recurrent.backend().fast and fast.recurrent.block.ffn.backend().backend == "triton"
    assert backends.choose("mla_decode", "cuda").backend == "triton"
    assert type(fast.recurrent.block.attn) is not openmythos.MLAttention


@pytest.mark.parametrize("fields", [{}, {"halting": "off"}, {"injection": "parcae", "h0": "zeros"}], ids=str)
def test_a_graphed_training_step(fields):
    """Routing and halting change from step to step. In a graph no position leaves early, so with ACT sums may round
    otherwise than in an eager step."""
    _, model = models(**fields)
    model.train()
    other = copy.deepcopy(model)
    step = graphed_step(other, lambda model, tokens: model(tokens, n_loops=4).logsumexp(-1).sin().sum(), warmup=2)
    for seed in range(5):
        tokens = ids(2, 96, seed=seed)
        _, expected = loss_and_gradients(model, tokens)
        step(tokens)
        assert not step.refused and bool(step._graphs) == (seed >= 2)
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in other.named_parameters()}
        if fields.get("halting") == "off":
            assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
        assert apart(found, expected) < 1e-5
        with torch.no_grad():
            for p, q in zip(model.parameters(), other.parameters()):
                p += 0.01 * p.sign()
                q.copy_(p)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_experts_weight_gradients_made_once(monkeypatch, dtype, limit):
    _, model = models(dtype)
    added = loss_and_gradients(model, ids(2, 96))[1]
    set_threshold(monkeypatch, "moe_weights_once", float("inf"))
    assert apart(loss_and_gradients(model, ids(2, 96))[1], added) < limit
