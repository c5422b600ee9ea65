"""A Recurrent-Depth Transformer in one file: depth without more weights, by looping one transformer block.

    e = prelude(embed(ids)); h = e                          e is injected in every loop
    for t in range(n_loops):                                the same weights in every loop
        f = block(norm(h + loop_embedding(t) + e))          latent attention (MLA), mixture of experts (MoE)
        f = f + lora(f, t)                                  the few weights that differ between loops
        h = A * h + B * e + f                               linear time-invariant (LTI) update, 0 <= A < 1
        out = out + weight(sigmoid(halt(h))) * h            adaptive computation time (ACT)
    logits = head(norm(coda(out)))

This is `openmythos.OpenMythos` with its default settings, without a cache. The parameters have the same names, so its
state_dict loads here: `python -m examples.rdt_in_one_file` compares the two. Shapes: B sequences of T tokens, width D.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

Linear = partial(nn.Linear, bias=False)
RMSNorm = partial(nn.RMSNorm, eps=1e-6)  # divides x by its root mean square (Zhang & Sennrich, 2019)


def rotary_table(dim, max_len, theta):
    """Unit phasors exp(i * position * theta^(-2k / dim)), (max_len, dim / 2)."""
    angle = torch.outer(torch.arange(max_len).float(), theta ** -(torch.arange(0, dim, 2) / dim))
    return torch.polar(torch.ones_like(angle), angle)


def apply_rope(x, freqs_cis):
    """Rotary position embedding (Su et al., 2021): rotates channels 2k and 2k + 1 of x (B, T, H, d) by a phasor."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs_cis.real[:, None], freqs_cis.imag[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class MLAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values are projections of one latent per token."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, H = cfg, cfg.n_heads
        nope, rope, v = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        self.q_down, self.q_norm = Linear(cfg.dim, cfg.q_lora_rank), RMSNorm(cfg.q_lora_rank)
        self.q_up_nope, self.q_up_rope = Linear(cfg.q_lora_rank, H * nope), Linear(cfg.q_lora_rank, H * rope)
        self.kv_down, self.kv_norm = Linear(cfg.dim, cfg.kv_lora_rank + rope), RMSNorm(cfg.kv_lora_rank)
        self.kv_up, self.wo = Linear(cfg.kv_lora_rank, H * (nope + v)), Linear(H * v, cfg.dim)

    def forward(self, x, freqs_cis):
        cfg, heads = self.cfg, (self.cfg.n_heads, -1)
        c_q = self.q_norm(self.q_down(x))
        q_nope, q_rope = self.q_up_nope(c_q).unflatten(-1, heads), self.q_up_rope(c_q).unflatten(-1, heads)
        # A cache would keep these two alone: the latent, and one rotary key that all heads share.
        latent, k_rope = self.kv_down(x).split((cfg.kv_lora_rank, cfg.qk_rope_head_dim), dim=-1)
        k_rope = apply_rope(k_rope.unsqueeze(2), freqs_cis).expand(-1, -1, cfg.n_heads, -1)
        kv = self.kv_up(self.kv_norm(latent)).unflatten(-1, heads)
        k_nope, v = kv.split((cfg.qk_nope_head_dim, cfg.v_head_dim), dim=-1)
        q = torch.cat((q_nope, apply_rope(q_rope, freqs_cis)), dim=-1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, heads, T, channels)
        return self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Expert(nn.Module):
    """SwiGLU feed-forward network (Shazeer, 2020)."""

    def __init__(self, dim, inner):
        super().__init__()
        self.gate, self.up, self.down = Linear(dim, inner), Linear(dim, inner), Linear(inner, dim)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoEFFN(nn.Module):
    """DeepSeekMoE (Dai et al., 2024): each token uses K of E routed experts, and all shared experts."""

    def __init__(self, cfg):
        super().__init__()
        self.topk, shared_dim = cfg.n_experts_per_tok, cfg.expert_dim * cfg.n_experts_per_tok
        self.router = Linear(cfg.dim, cfg.n_experts)
        self.register_buffer("router_bias", torch.zeros(cfg.n_experts))  # balances the load, without a gradient
        self.routed_experts = nn.ModuleList(Expert(cfg.dim, cfg.expert_dim) for _ in range(cfg.n_experts))
        self.shared_experts = nn.ModuleList(Expert(cfg.dim, shared_dim) for _ in range(cfg.n_shared_experts))

    def forward(self, x):
        flat = x.flatten(0, 1)  # (B * T, D)
        logits = self.router(flat)
        expert_idx = (logits + self.router_bias).topk(self.topk).indices  # the bias chooses ...
        topk_weights = logits.gather(1, expert_idx).softmax(-1)  # ... and does not enter the weights
        out = sum(expert(flat) for expert in self.shared_experts) + torch.zeros_like(flat)
        for e, expert in enumerate(self.routed_experts):
            token, slot = torch.where(expert_idx == e)
            out = out.index_add(0, token, topk_weights[token, slot, None] * expert(flat[token]))
        return out.view_as(x)


class TransformerBlock(nn.Module):
    """Pre-norm attention and FFN, each added to its input."""

    def __init__(self, cfg, use_moe=False):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(cfg.dim), MLAttention(cfg)
        self.ffn_norm, self.ffn = RMSNorm(cfg.dim), MoEFFN(cfg) if use_moe else Expert(cfg.dim, cfg.dim * 4 // 3)

    def forward(self, x, freqs_cis):
        x = x + self.attn(self.attn_norm(x), freqs_cis)
        return x + self.ffn(self.ffn_norm(x))


class LTIInjection(nn.Module):
    """h' = A * h + B * e + f with a diagonal A in [0, 1): no parameter values make the loop unstable (Parcae, 2026)."""

    def __init__(self, dim):
        super().__init__()
        self.log_A, self.log_dt = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(1))
        self.B = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, h, e, f):
        A = torch.exp(-torch.exp((self.log_dt + self.log_A).clamp(-16.6, 20)))
        return A * h + self.B * e + f


class LoRAAdapter(nn.Module):
    """Depth-wise LoRA (Bae et al., 2024): one low-rank map for all loops, with a scale vector per loop."""

    def __init__(self, dim, rank, max_loops):
        super().__init__()
        self.down, self.scale = Linear(dim, rank), nn.Embedding(max_loops, rank)
        self.B = nn.Parameter(torch.randn(rank, dim) * 0.02)

    def forward(self, f, t):
        return self.down(f) * self.scale.weight[min(t, len(self.scale.weight) - 1)] @ self.B


class RecurrentBlock(nn.Module):
    """The loop, with adaptive computation time (Graves, 2016): each position halts when it has computed enough."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.block, self.norm = cfg, TransformerBlock(cfg, use_moe=True), RMSNorm(cfg.dim)
        self.injection, self.act = LTIInjection(cfg.dim), nn.ModuleDict({"halt": nn.Linear(cfg.dim, 1)})
        self.lora = LoRAAdapter(cfg.dim, cfg.lora_rank, cfg.max_loop_iters)

    def loop_embedding(self, e, t):
        """Tells the block which loop it is in: sines and cosines of t in the first eighth of the channels."""
        dim = e.shape[-1] // 8
        angle = t * 10000.0 ** -(torch.arange(0, dim, 2, dtype=e.dtype, device=e.device) / dim)
        return F.pad(torch.cat((angle.sin(), angle.cos()))[:dim], (0, e.shape[-1] - dim))

    def forward(self, e, freqs_cis, n_loops):
        h, out = e, torch.zeros_like(e)
        cumulative_p = e.new_zeros(e.shape[:2])  # (B, T): the sum of p so far
        running = torch.ones_like(cumulative_p, dtype=torch.bool)
        for t in range(n_loops):
            f = self.block(self.norm(h + self.loop_embedding(e, t) + e), freqs_cis)
            h = self.injection(h, e, f + self.lora(f, t))
            p = torch.sigmoid(self.act["halt"](h)).squeeze(-1)
            # Where the threshold is crossed, the state gets all the weight that is left; halted positions add nothing.
            crossed = cumulative_p + p >= self.cfg.act_threshold
            weight = torch.where(crossed, (1 - cumulative_p).clamp(min=0), p) * running
            out = out + weight.unsqueeze(-1) * h
            cumulative_p = cumulative_p + p * running
            running = running & ~crossed
        return out


class RDT(nn.Module):
    """ids (B, T) -> logits (B, T, vocabulary)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.embed, self.norm = cfg, nn.Embedding(cfg.vocab_size, cfg.dim), RMSNorm(cfg.dim)
        self.prelude = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.prelude_layers))
        self.recurrent = RecurrentBlock(cfg)
        self.coda = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.coda_layers))
        self.head = Linear(cfg.dim, cfg.vocab_size)
        self.head.weight = self.embed.weight
        for name, dim in (("freqs_cis_mla", cfg.qk_rope_head_dim), ("freqs_cis", cfg.dim // cfg.n_heads)):
            self.register_buffer(name, rotary_table(dim, cfg.max_seq_len, cfg.rope_theta))  # freqs_cis is unused here

    def forward(self, ids, n_loops=None):
        x, freqs_cis = self.embed(ids), self.freqs_cis_mla[: ids.shape[1]]
        for block in self.prelude:
            x = block(x, freqs_cis)
        x = self.recurrent(x, freqs_cis, n_loops or self.cfg.max_loop_iters)
        for block in self.coda:
            x = block(x, freqs_cis)
        return self.head(self.norm(x))


if __name__ == "__main__":
    from openmythos import MythosConfig, OpenMythos

    cfg = MythosConfig(dim=128, n_heads=4, n_experts=8, max_loop_iters=6)
    reference, model, ids = OpenMythos(cfg), RDT(cfg), torch.randint(cfg.vocab_size, (2, 32))
    model.load_state_dict(reference.state_dict())
    difference = (model(ids) - reference(ids)).norm() / reference(ids).norm()
    print(f"The logits differ from those of openmythos by {difference:.1e} (relative, float32).")
