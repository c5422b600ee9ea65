"""What runs of `openmythos train` in tests train: a model whose step is all overhead, and a few words."""

import random
from pathlib import Path

MODEL = dict(
    vocab_size=257, dim=32, n_heads=2, n_kv_heads=1, max_seq_len=64, max_loop_iters=4, prelude_layers=1, coda_layers=1,
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_experts=4,
    n_shared_experts=1, n_experts_per_tok=2, expert_dim=16, lora_rank=4,
)  # fmt: skip


def write_text(folder: Path) -> Path:
    """Writes 40 documents, and returns their folder."""
    rng = random.Random(0)
    folder.mkdir()
    for i in range(40):
        words = [rng.choice(("loop", "depth", "token", "state")) for _ in range(60)]
        (folder / f"{i}.txt").write_text(f"{i} " + " ".join(words))
    return folder
