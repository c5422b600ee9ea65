"""Small faults in the drop-in modules, in how ops reach them and in the swap."""

from tests.mutations.mutation import Mutation

_ATTENTION = "openmythos_kernels/nn/attention.py"
_MOE = "openmythos_kernels/nn/moe.py"
_RECURRENCE = "openmythos_kernels/nn/recurrence.py"
_SWAP = "openmythos_kernels/swap.py"
_TOKEN_BLOCK, _TOKEN_LOOP = (f"openmythos_kernels/nn/paths/decode_{name}.py" for name in ("block", "loop"))
_TESTS = "tests/openmythos_kernels"
_BLOCK = f"{_TESTS}/ops/test_loop.py -k whole_block"
_TOKENS = f"{_TESTS}/nn/paths/test_decode_loop.py -k"

MUTATIONS = [
    Mutation(
        "attention: a decoded token is written over by the next",
        _ATTENTION, "entry.lengths = [n + 1 for n in entry.lengths]", "entry.lengths = list(entry.lengths)",
        f"{_TESTS}/ops/test_mla.py -k decode_stays",
    ),
    Mutation(
        "attention: a later chunk of a prompt sees its future",
        _ATTENTION, "hidden = None if square else mask.additive(k.shape[2], q)", "hidden = None",
        f"{_TESTS}/ops/test_mla.py -k chunked",
    ),
    Mutation(
        "attention: scores are scaled by the width of the values",
        _ATTENTION, "scale=width**-0.5", "scale=v_dim**-0.5", f"{_TESTS}/ops/test_mla.py -k training",
    ),
    Mutation(
        "attention: a stale cache: the entry's tensors of another batch are taken",
        _ATTENTION, "held is None or held.shape[0] != len(x) or", "held is None or", f"{_TESTS}/ops/test_mla.py -k another_batch",
    ),
    Mutation(
        "experts: few tokens find their experts in the wrong order",
        _MOE, "[experts[e] for e in used]", "[experts[e] for e in reversed(used)]",
        f"{_TESTS}/ops/test_moe.py -k few_tokens",
    ),
    Mutation(
        "experts: what was routed is not counted",
        _MOE, "        self.record_load(expert_idx, load)\n        arguments", "        arguments", f"{_TESTS}/ops/test_moe.py -k module",
    ),
    Mutation(
        "experts: without gradients what was routed is not counted",
        _MOE, "        self.record_load(expert_idx, load)\n        return", "        return", f"{_TESTS}/nn/paths/test_moe_inference.py -k counted",
    ),
    Mutation(
        "prompts: queries that begin later are taken for the first",
        "openmythos_kernels/nn/paths/prefill_block.py", "type(mask) is CausalMask and mask.start == 0", "type(mask) is CausalMask",
        f"{_TESTS}/nn/paths/test_prefill_block.py -k other_masks",
    ),
    Mutation(
        "experts at once: nobody looks for hooks on shared experts",
        _MOE, "_replaced(shared) or ", "", f"{_TESTS}/nn/paths/test_moe_inference.py -k brings_back",
    ),
    Mutation(
        "experts: a hook that runs before the forward is skipped",
        "openmythos_kernels/nn/guards.py", 'state["_forward_hooks"] or state["_forward_pre_hooks"] or', 'state["_forward_hooks"] or',
        f"{_TESTS}/ops/test_moe.py -k hooks",
    ),
    Mutation(
        "loop: the LoRA takes the next loop's scale",
        _RECURRENCE, "[min(t, scale.num_embeddings - 1)]", "[min(t + 1, scale.num_embeddings - 1)]", _BLOCK,
    ),
    Mutation(
        "loop: the next loop enters with this loop's index",
        _RECURRENCE, "_embedding(t + 1, h),", "_embedding(t, h),", _BLOCK,
    ),
    Mutation(
        "loop: the last loop spends the rest though it should be dropped",
        _RECURRENCE, 'rest=last and setting(self.cfg, "act_remainder") == "last",', "rest=last,",
        f"{_TESTS}/nn/paths/test_early_exit.py -k per_sequence",
    ),
    Mutation(
        "recurrent block: what is frozen moves on",
        _RECURRENCE, "new = torch.where(state.running.unsqueeze(-1), new, h)", "pass", _BLOCK,
    ),
    Mutation(
        "recurrent block: without halting its weights hear of the loss",
        _RECURRENCE, "weights[4].detach(), weights[5].detach()", "weights[4], weights[5]", _BLOCK,
    ),
    Mutation(
        "block: the feed-forward layer is added to its norm instead of the stream",
        "openmythos_kernels/nn/block.py", "return x + self._ffn(normed)", "return normed + self._ffn(normed)",
        f"{_TESTS}/nn/test_block.py",
    ),
    Mutation(
        "op: gradients of a list of tensors go to the first",
        "openmythos_kernels/ops/op.py", "flat.extend([None] * length if grad is None else grad)",
        "flat.extend([None] * length if grad is None else [grad[0]] * length)", f"{_TESTS}/ops/test_descriptions.py -k budget and moe_experts-float32-several",
    ),
    Mutation(
        "norm: the gradient of the sum is forgotten",
        "openmythos_kernels/ops/norm/rms_norm.py", "grad_sum.contiguous() if ctx.added and grad_sum is not None else None", "None",
        f"{_TESTS}/ops/test_descriptions.py -k budget and rms_norm",
    ),
    Mutation(
        "swap: restore leaves a trace",
        _SWAP, 'module.__dict__.pop("idle_experts", None)', "pass", f"{_TESTS}/nn/test_idle_experts.py -k can_be_changed",
    ),
    Mutation(
        "token block: a decoded token is written over by the next",
        _TOKEN_BLOCK, "entry.lengths = [n + 1 for n in entry.lengths]", "pass", f"{_TOKENS} logits",
    ),
    Mutation(
        "token block: the experts of a stack's second block are those of its first",
        _TOKEN_BLOCK, "router = [ffn._modules", "router = [blocks[0].ffn._modules", f"{_TOKENS} logits",
    ),
    Mutation(
        "token block: what was routed is not counted",
        _TOKEN_BLOCK, "            ffn.record_load(expert_idx[i])\n", "            pass\n", f"{_TOKENS} counted",
    ),
    Mutation(
        "token block: a hook on the router is skipped",
        _TOKEN_BLOCK, 'obstacle("router", router, nn.Linear) or ', "", f"{_TOKENS} hooks",
    ),
    Mutation(
        "token block: dropout is skipped",
        _TOKEN_BLOCK, 'if drops(parts["resid_drop"]) or drops(attn._modules["attn_drop"]):', "if False:", f"{_TOKENS} would_not_do",
    ),
    Mutation(
        "token loop: a hook on the block is skipped",
        _TOKEN_LOOP, 'obstacle("block", block, TransformerBlock) or ', "", f"{_TOKENS} hooks",
    ),
    Mutation(
        "token loop: a hook on the LoRA's projection is skipped",
        _TOKEN_LOOP, 'lora is not None and obstacle("down", lora._modules["down"], nn.Linear)', "False", f"{_TOKENS} hooks",
    ),
    Mutation(
        "token loop: only what the blocks added is never told apart",
        _TOKEN_LOOP, 'residual=setting(recurrent.cfg, "injection") == "residual"', "residual=False", f"{_TOKENS} logits",
    ),
    Mutation(
        "attention: what was to be made again is kept",
        "openmythos_kernels/nn/attention.py", "if entry is None and self._forgets(x)", "if False",
        f"{_TESTS}/nn/paths/test_mla_recompute.py",
    ),
    Mutation(
        "repeated experts: a weight changed in between goes unnoticed",
        "openmythos_kernels/ops/moe/repeated.py", "        self._check_versions(graph)\n", "",
        f"{_TESTS}/ops/test_moe_repeated.py -k changed",
    ),
    Mutation(
        "repeated experts: under autocast each call reads float32 weights",
        "openmythos_kernels/ops/moe/repeated.py", "self.weights = _cast(self.weights, dtype)", "pass",
        f"{_TESTS}/ops/test_moe_repeated.py -k rounded",
    ),
    Mutation(
        "from latents: the backward runs without autocast",
        "openmythos_kernels/nn/paths/mla_recompute.py", "with torch.enable_grad(), ctx.autocast():", "with torch.enable_grad():",
        "tests/contracts/test_model.py -k autocast",
    ),
    Mutation(
        "from latents: the backward goes by what the layer has then",
        "openmythos_kernels/nn/paths/mla_recompute.py", "per_head(*leaves, phasors, weights=own)", "per_head(*leaves, phasors)",
        f"{_TESTS}/nn/paths/test_mla_recompute.py -k other_weights",
    ),
    Mutation(
        "from latents: hooks see the parts run twice",
        _ATTENTION, "return not any(obstacle(name, self._modules[name], nn.Linear) for name in (*_UP, \"wo\"))", "return True",
        f"{_TESTS}/nn/paths/test_mla_recompute.py -k hooks",
    ),
    Mutation(
        "token graph: every token goes to the same place",
        "openmythos_kernels/nn/paths/cuda_graph.py", "    lengths.tensor += 1\n", "", f"{_TESTS}/nn/paths/test_cuda_graph.py",
    ),
    Mutation(
        "token graph: a truncated cache goes unnoticed",
        "openmythos_kernels/nn/paths/cuda_graph.py", "elif held != self._held:", "elif False:", f"{_TESTS}/nn/paths/test_cuda_graph.py",
    ),
    Mutation(
        "token graph: moved weights go unnoticed",
        "openmythos_kernels/nn/paths/cuda_graph.py", "if [w.data_ptr() for w in self._weights] != self._addresses:", "if False:",
        f"{_TESTS}/nn/paths/test_cuda_graph.py",
    ),
    Mutation(
        "token graph: a cache that grew is still the captured one",
        "openmythos_kernels/nn/paths/cuda_graph.py", "return all(now.get(name) is x for", "return all(True for",
        f"{_TESTS}/nn/paths/test_cuda_graph.py",
    ),
    Mutation(
        "token graph: what the host keeps is captured",
        "openmythos_kernels/nn/paths/cuda_graph.py", "if self._lengths.asked != len(self._entries):", "if False:",
        f"{_TESTS}/nn/paths/test_cuda_graph.py",
    ),
]
