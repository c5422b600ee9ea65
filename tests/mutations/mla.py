"""Small faults in the Triton kernels of latent attention, their launches and the tuning cache."""

from tests.mutations.mutation import Mutation

_KERNELS = "openmythos_kernels/ops/mla/kernels"
_BUDGET = "tests/triton_on_cpu/test_specifications.py -k interpreter-"
_TESTS = "tests/openmythos_kernels/ops/mla/test_kernels.py -k test_"

MUTATIONS = [
    Mutation(
        "mla forward: a query sees one key of the future",
        f"{_KERNELS}/attention.py",
        "sees = tl.minimum(begin + row + 1, held)",
        "sees = tl.minimum(begin + row + 2, held)",
        f"{_BUDGET}mla_attention",
    ),
    Mutation(
        "mla forward: the blocks taken for whole reach past what the first query sees",
        f"{_KERNELS}/attention.py",
        "all_see = tl.minimum(begin + m + 1, held)",
        "all_see = tl.minimum(begin + m + BLOCK_M, held)",
        f"{_BUDGET}mla_attention",
    ),
    Mutation(
        "mla backward: delta is left out of dq",
        f"{_KERNELS}/attention_backward.py",
        "dscore = (weight * (dweight - delta[:, None]))",
        "dscore = (weight * dweight)",
        f"{_BUDGET}mla_attention",
    ),
    Mutation(
        "mla backward: every head writes its part of the shared key's gradient to the first one's place",
        f"{_KERNELS}/attention_backward.py",
        "parts += (h * batch + b) * S * ROPE",
        "parts += b * S * ROPE",
        f"{_BUDGET}mla_attention",
    ),
    Mutation(
        "mla backward: the shared key misses the last head",
        f"{_KERNELS}/attention_backward.py",
        "for g in range(0, groups):",
        "for g in range(0, tl.maximum(groups - 1, 1)):",
        f"{_BUDGET}mla_attention",
    ),
    Mutation(
        "mla backward: keys past a row's end get gradients",
        f"{_KERNELS}/attention_backward.py",
        "tl.where(valid, dv, 0.0)",
        "dv",
        f"{_BUDGET}mla_attention",
    ),
    Mutation(
        "mla rows: every sequence reads the first one's rows",
        f"{_KERNELS}/attention.py",
        "first = tl.load(limits + b)",
        "first = tl.load(limits)",
        f"{_BUDGET}mla_attention_rows",
    ),
    Mutation(
        "mla rows: a row's place among the rows serves as its position",
        f"{_KERNELS}/attention.py",
        "tl.load(places + first + row, mask=row < count, other=-1)",
        "tl.cast(row, tl.int64)",
        f"{_BUDGET}mla_attention_rows",
    ),
    Mutation(
        "mla rows: the blocks taken for whole reach up to the last row's position",
        f"{_KERNELS}/attention.py",
        "all_see = tl.minimum(tl.load(places + first + m) + 1, S)",
        "all_see = tl.minimum(tl.load(places + first + tl.minimum(m + BLOCK_M, count) - 1) + 1, S)",
        f"{_BUDGET}mla_attention_rows",
    ),
    Mutation(
        "mla rows: a block of queries that sees only some of a block of keys gives it no gradient",
        f"{_KERNELS}/attention_backward.py",
        "begins = tl.minimum(before // BLOCK_M * BLOCK_M, stop)",
        "begins = tl.minimum((before + BLOCK_M - 1) // BLOCK_M * BLOCK_M, stop)",
        f"{_BUDGET}mla_attention_rows",
    ),
    Mutation(
        "mla rows: the gradients of keys take a row's place among the rows for its position",
        f"{_KERNELS}/attention_backward.py",
        "at = tl.load(places + row, mask=row < count, other=-1).to(tl.int32) if PACKED",
        "at = row if PACKED",
        f"{_BUDGET}mla_attention_rows",
    ),
    Mutation(
        "mla decode: the last tile reads past the row's end",
        f"{_KERNELS}/latent.py",
        "held = (n + tl.arange(0, BLOCK_N) < last)[:, None]",
        "held = (n + tl.arange(0, BLOCK_N) < last + 1)[:, None]",
        f"{_BUDGET}mla_attend_latent",
    ),
    Mutation(
        "mla decode: pages are taken in order, whatever the table says",
        f"{_KERNELS}/latent.py",
        "page = tl.load(table + b * pages + key // PAGE, mask=key < last, other=0).to(tl.int64)",
        "page = tl.cast(b * pages + key // PAGE, tl.int64)",
        f"{_BUDGET}mla_attend_latent",
    ),
    Mutation(
        "mla decode: rows of the cache are found by 32-bit numbers",
        f"{_KERNELS}/latent.py",
        "return page * latent_page + inside * R,",
        "return tl.cast(page * latent_page + inside * R, tl.int32),",
        f"{_TESTS}addresses",
    ),
    Mutation(
        "mla decode: the value tile is loaded again",
        f"{_KERNELS}/latent.py",
        "        score = dot(shared, tl.trans(qr), score) * scale",
        "        value = tl.load(at, mask=held & (channel < R)[None, :], other=0.0) if CHUNKS == 1 else value\n"
        "        score = dot(shared, tl.trans(qr), score) * scale",
        f"{_TESTS}bytes_read",
    ),
    Mutation(
        "mla merge: splits weigh the same",
        f"{_KERNELS}/latent.py",
        "weight = tl.exp2(log - base)",
        "weight = tl.where(log > float('-inf'), 1.0, 0.0)",
        f"{_TESTS}splits",
    ),
    Mutation(
        "mla append: a chunk overwrites its first token's place",
        f"{_KERNELS}/norm_rope.py",
        "place = tl.load(lengths + b) + t",
        "place = tl.load(lengths + b)",
        f"{_BUDGET}mla_append",
    ),
    Mutation(
        "mla norm: the backward rotates forwards",
        f"{_KERNELS}/norm_rope.py",
        "* 2 * HALF, -1.0,",
        "* 2 * HALF, 1.0,",
        f"{_BUDGET}mla_norm_rope",
    ),
    Mutation(
        "tuning: an interrupted job is stored",
        "openmythos_kernels/runtime/tuning.py",
        "                return found\n            with",
        "                break\n            with",
        "tests/openmythos_kernels/runtime/test_tuning.py -k time_limit",
    ),
    Mutation(
        "mla forward: a strided start is read as if it were dense",
        "openmythos_kernels/ops/mla/attention.py",
        "start.contiguous(), key_lengths.contiguous()",
        "start, key_lengths",
        "tests/triton_on_cpu/test_specifications.py -k layouts and mla_attention and strided",
    ),
]
