"""Small faults in the ops over rows."""

from tests.mutations.mutation import Mutation

_ROWS = "tests/openmythos_kernels/ops/test_rows.py"

MUTATIONS = [
    Mutation(
        "rows: a halted token is read past the loop in which it halted",
        "csrc/cpu/mla/table.h",
        "slot(std::min(loop[n], ran))",
        "slot(std::max(std::min(loop[n], ran), loop[n] - 1))",
        f"{_ROWS} -k op and one_after",
    ),
    Mutation(
        "rows: a row reads the keys of the sequence before",
        "csrc/cpu/mla/table.h",
        "first[sequence[n] * first_stride + j]",
        "first[(sequence[n] ? sequence[n] - 1 : 0) * first_stride + j]",
        f"{_ROWS} -k op and one_after",
    ),
    Mutation(
        "rows: a latent is written to the slot of the loop before",
        "csrc/cpu/mla/table.h",
        "slot(loop[n]); }",
        "slot(loop[n] ? loop[n] - 1 : 0); }",
        f"{_ROWS} -k op and one_after",
    ),
    Mutation(
        "rows: all loops past the last slot share it",
        "csrc/cpu/mla/table.h",
        "t < keep ? t : t % keep",
        "t < keep ? t : keep - 1",
        f"{_ROWS} -k op and slot",
    ),
    Mutation(
        "rows: the table does not learn of the loop that runs",
        "csrc/cpu/layer/loop_rows.cpp",
        "deepen(here);",
        "",
        f"{_ROWS} -k op and one_after",
    ),
    Mutation(
        "rows: a row past the pool's end passes",
        "csrc/cpu/mla/places.cpp",
        "most < pool_rows",
        "most <= pool_rows",
        f"{_ROWS} -k outside",
    ),
    Mutation(
        "rows: halted rows run on",
        "csrc/cpu/layer/loop_rows.cpp",
        "(!freeze || running.const_data_ptr<bool>()[n])",
        "true",
        f"{_ROWS} -k op and (one_after or decides)",
    ),
    Mutation(
        "rows: the remainder is spent a loop too late",
        "csrc/cpu/layer/loop_rows.cpp",
        "t == end - 1;",
        "t == end;",
        f"{_ROWS} -k op and one_after and rest",
    ),
    Mutation(
        "rows: every row has the first loop's embedding",
        "csrc/cpu/layer/loop_rows.cpp",
        "embeddings[t[n]]",
        "embeddings[0]",
        f"{_ROWS} -k op and one_after",
    ),
    Mutation(
        "rows: every row has the first loop's scale",
        "csrc/cpu/layer/loop_step.h",
        "at::clamp_max(t, scale.size(0) - 1)",
        "at::clamp_max(t, 0)",
        f"{_ROWS} -k op and one_after",
    ),
    Mutation(
        "rows: without halting the output stays behind",
        "csrc/cpu/layer/loop_rows.cpp",
        "put(h_out, act ? state.h_out : state.h);",
        "put(h_out, state.h_out);",
        f"{_ROWS} -k op and decides",
    ),
    Mutation(
        "rows: many rows are computed by the library, whose bits depend on their number",
        "csrc/cpu/layer/block_decode.cpp",
        "most = moe::kGemvTokens;",
        "most = N;",
        f"{_ROWS} -k company",
    ),
    Mutation(
        "rows: a matrix times one vector is summed in another order than times several",
        "csrc/cpu/simd/matvec.h",
        "for (int64_t c = 0; c + step<T> <= cols; c += step<T>) {\n    const auto w",
        "for (int64_t c = cols - cols % step<T> - step<T>; c >= 0; c -= step<T>) {\n    const auto w",
        f"{_ROWS} -k company",
    ),
    Mutation(
        "rows: the formula reads a halted token past the loop in which it halted",
        "openmythos_kernels/ops/layer/formula.py",
        "torch.minimum(loop, last.long())",
        "torch.maximum(torch.minimum(loop, last.long()), loop - 1)",
        f"{_ROWS} -k formula and one_after",
    ),
]
