"""Small faults in the C++ kernels."""

from tests.mutations.mutation import Mutation

_CHECKED = "tests/openmythos_kernels/ops/test_descriptions.py -k"
_BUDGET = f"{_CHECKED} budget and"

MUTATIONS = [
    Mutation(
        "cpu norm: the last, partial vector of a row does not count",
        "csrc/cpu/norm/norm_row.h", "openmythos::sum<A>(squares + more) + tail;", "openmythos::sum<A>(squares + more);",
        f"{_BUDGET} rms_norm",
    ),
    Mutation(
        "cpu norm: the weight's gradient misses the last block of rows",
        "csrc/cpu/norm/norm_row.h", "for (size_t i = 0; i < slabs.size(); ++i)", "for (size_t i = slabs.size() > size_t(D) ? D : 0; i < slabs.size(); ++i)",
        f"{_BUDGET} rms_norm",
    ),
    Mutation(
        "cpu sums over rows: blocks are cut by the number of threads",
        "csrc/cpu/runtime/row_blocks.h", "std::max(kFewest, ((N + kMost - 1) / kMost + kGroup - 1) / kGroup * kGroup)",
        "std::max<int64_t>(1, (N + at::get_num_threads() - 1) / at::get_num_threads())",
        f"{_CHECKED} threads",
    ),
    Mutation(
        "cpu loop: the halting bias is left out",
        "csrc/cpu/loop/step.cpp", "lane_sum(logits[r]) + x.halt_bias", "lane_sum(logits[r])", f"{_BUDGET} loop_step",
    ),
    Mutation(
        "cpu loop: what is left is counted after this loop's share",
        "csrc/common/lti.h", "const A left = A(1) - cumulative_p;", "const A left = A(1) - total;", f"{_BUDGET} loop_step",
    ),
    Mutation(
        "cpu loop backward: the input's gradient through the norm is dropped",
        "csrc/cpu/loop/step_backward.cpp", "put_tile(de + c, fma(ch.tile(t, kB), g, into_e), n, x.streamed);",
        "put_tile(de + c, ch.tile(t, kB) * g, n, x.streamed);", f"{_BUDGET} loop_step",
    ),
    Mutation(
        "cpu loop backward: the decay stands for its slope",
        "csrc/cpu/loop/step_backward.cpp", "lti::decay<A>(log_dt, log_A[c + i]).slope", "lti::decay<A>(log_dt, log_A[c + i]).value",
        f"{_BUDGET} loop_step",
    ),
    Mutation(
        "cpu gather: rows without an index are left as the memory was",
        "csrc/cpu/loop/compaction.cpp", "if (row < 0) std::memset(to + i * row_bytes, 0, row_bytes);\n    else std::memcpy",
        "if (row >= 0) std::memcpy", f"{_BUDGET} gather",
    ),
    Mutation(
        "cpu experts: the last expert is dropped",
        "csrc/cpu/moe/gemv.cpp", "for (int64_t e = 0; e < routed.size(); ++e)", "for (int64_t e = 0; e + 1 < routed.size(); ++e)",
        f"{_BUDGET} moe_experts",
    ),
    Mutation(
        "cpu experts: topk_weights do not weigh",
        "csrc/cpu/moe/gemv.cpp", "axpy<acc_t<T>>(gate, scratch", "axpy<acc_t<T>>(acc_t<T>(1), scratch", f"{_BUDGET} moe_experts",
    ),
    Mutation(
        "cpu experts: the first shared expert is left out",
        "csrc/cpu/moe/grouped.cpp", "for (int64_t e = 0; e < shared.size(0); ++e)", "for (int64_t e = 1; e < shared.size(0); ++e)",
        f"{_BUDGET} moe_experts",
    ),
    Mutation(
        "cpu experts backward: an expert without a token keeps what was in memory as a gradient",
        "csrc/cpu/moe/experts.cpp", "return plan && plan->rows(e) == 0;", "return plan && e < 0;",
        f"{_BUDGET} moe_experts",
    ),
    Mutation(
        "cpu experts backward: the second half of the inner channels repeats the first gate's weights",
        "csrc/cpu/moe/gemv_backward.cpp", "pass(job.up, job.dup, job.du);", "pass(job.gate, job.dup, job.du);", f"{_BUDGET} moe_experts",
    ),
    Mutation(
        "cpu experts backward: a gate's gradient is that of its expert's first piece",
        "csrc/cpu/moe/gemv_backward.cpp", "for (size_t i = parts[j]; i < end; ++i) total", "for (size_t i = parts[j]; i < parts[j] + 1; ++i) total",
        "tests/openmythos_kernels/ops/test_moe.py -k pieces",
    ),
    Mutation(
        "cpu products: the columns behind the last full tile are left out",
        "csrc/cpu/simd/small_gemm.h", "unpad(sums, acc + c, lda, M, cols - c);", "unpad(sums, acc + c, lda, M, cols - c - 1);",
        f"{_BUDGET} moe_experts",
    ),
    Mutation(
        "cpu experts in bfloat16: both numbers of a pair are the first",
        "csrc/cpu/simd/bf16_dot.h", "convert_from_float<c10::BFloat16>(even, odd)", "convert_from_float<c10::BFloat16>(even, even)",
        "tests/openmythos_kernels/ops/test_moe.py -k blocks",
    ),
    Mutation(
        "cpu experts in bfloat16: an odd number of columns goes in pairs too",
        "csrc/cpu/moe/bf16_dot.cpp", "x.size(1) % 2 != 0 || ", "", "tests/openmythos_kernels/ops/test_moe.py -k odd",
    ),
    Mutation(
        "cpu experts in bfloat16: the hidden activation's second block takes the first one's place",
        "csrc/cpu/moe/bf16_dot.cpp", "panels.hidden + i / 2 * width", "panels.hidden", "tests/openmythos_kernels/ops/test_moe.py -k blocks",
    ),
    Mutation(
        "cpu experts at once: weights that are not where they say are read all the same",
        "csrc/cpu/moe/experts.cpp", " || t.unsafeGetTensorImpl()->is_python_dispatch()", "",
        "tests/openmythos_kernels/nn/paths/test_moe_inference.py -k another",
    ),
    Mutation(
        "cpu experts at once: memory that was freed is read",
        "csrc/cpu/moe/experts.cpp", "return t.storage().nbytes() >= end;", "return end || true;",
        "tests/openmythos_kernels/nn/paths/test_moe_inference.py -k brings_back",
    ),
    Mutation(
        "cpu experts at once: a trace is of what one input chose",
        "csrc/cpu/moe/bindings.cpp", " || at::tracer::impl::is_dispatch_enabled()", "",
        "tests/openmythos_kernels/nn/paths/test_moe_inference.py -k trace",
    ),
    Mutation(
        "cpu experts at once: what the router raises leaves the others waiting for tasks",
        "csrc/cpu/runtime/work_queue.h", "total.store(0, std::memory_order_release);", "total.store(known + 1, std::memory_order_release);",
        "tests/openmythos_kernels/nn/paths/test_moe_inference.py -k raises",
    ),
    Mutation(
        "cpu experts at once: indices count among all experts",
        "csrc/cpu/moe/inference.cpp", "return place[e]; });", "return std::min<int64_t>(e, used.size() - 1); });",
        "tests/openmythos_kernels/nn/paths/test_moe_inference.py -k bits",
    ),
    Mutation(
        "cpu route: a token's gradient misses the mean",
        "csrc/cpu/moe/route.cpp", "A(g[p]) * (A(dg[p]) - mean)", "A(g[p]) * A(dg[p])", f"{_BUDGET} moe_route",
    ),
    Mutation(
        "cpu route: the bias weighs",
        "csrc/cpu/moe/route.cpp", "weight[j] = row[e];", "weight[j] = queue[j].first;", f"{_BUDGET} moe_route",
    ),
    Mutation(
        "cpu SwiGLU: the last piece of a row takes in what lies behind it",
        "csrc/cpu/moe/swiglu.h", "std::copy_n(p, count, buffer);", "std::copy_n(p, step<T>, buffer);", f"{_BUDGET} moe_experts",
    ),
    Mutation(
        "cpu dense layer: the gate's weights serve as the other's",
        "csrc/cpu/moe/swiglu_ffn.cpp", "{{gate}, {up}, {down}, gate.size(0)}", "{{gate}, {gate}, {down}, gate.size(0)}", f"{_BUDGET} swiglu",
    ),
    Mutation(
        "cpu attention: splits weigh the same, whatever their largest scores",
        "csrc/cpu/mla/decode.cpp", "const A weight = std::exp(buf.top[t * buf.heads + h] - top) / mass;", "const A weight = A(1) / mass;",
        "tests/openmythos_kernels/ops/test_mla.py -k decode",
    ),
    Mutation(
        "cpu block decode: the feed-forward layer's residual is dropped",
        "csrc/cpu/layer/block_decode.cpp", "return {y.add_(sum), expert_idx};", "return {y, expert_idx};", f"{_BUDGET} block_decode",
    ),
    Mutation(
        "cpu block decode: the router reads what stands before the norm",
        "csrc/cpu/layer/block_decode.cpp", "logits(behind, router[0])", "logits(sum, router[0])", f"{_BUDGET} block_decode",
    ),
    Mutation(
        "cpu block prompt: every sequence has the first one's places",
        "csrc/cpu/layer/block_prompt.cpp", "freqs.narrow(0, begin, end - begin)", "freqs.narrow(0, 0, end - begin)", f"{_BUDGET} block_prompt",
    ),
    Mutation(
        "cpu block prompt: a share of the sequences is written over another's",
        "csrc/cpu/layer/block_prompt.cpp", "y.mutable_data_ptr<float>() + begin * size", "y.mutable_data_ptr<float>()",
        "tests/openmythos_kernels/nn/paths/test_prefill_block.py -k equals",
    ),
    Mutation(
        "cpu loop decode: every loop has the first loop's scale",
        "csrc/cpu/layer/loop_decode.cpp", "std::min(t, scale.size(0) - 1)", "0", f"{_BUDGET} loop_decode",
    ),
    Mutation(
        "cpu loop decode: a loop is told its own number, not the next one's",
        "csrc/cpu/layer/loop_decode.cpp", "embeddings[last ? t : t + 1]", "embeddings[t]", f"{_BUDGET} loop_decode",
    ),
    Mutation(
        "cpu loop decode: the rest is spent in the first loop",
        "csrc/cpu/layer/loop_decode.cpp", "last && spend_remainder", "spend_remainder", f"{_BUDGET} loop_decode",
    ),
    Mutation(
        "cpu loop decode: later loops read the first loop's keys",
        "csrc/cpu/layer/loop_decode.cpp", "blocks[i](f, freqs, latent_caches[at], rope_caches[at], lengths)",
        "blocks[i](f, freqs, latent_caches[i], rope_caches[i], lengths)", f"{_BUDGET} loop_decode",
    ),
    Mutation(
        "cpu pages: a block in use is handed out again",
        "csrc/cpu/runtime/allocator.cpp", "        kept_.erase(std::next(it).base());\n", "",
        "tests/openmythos_kernels/runtime/test_allocator.py",
    ),
    Mutation(
        "cpu pages: whatever comes back is kept",
        "csrc/cpu/runtime/allocator.cpp", "while (bytes_kept_ > kKept)", "while (bytes_kept_ > 16 * kKept)",
        "tests/openmythos_kernels/runtime/test_allocator.py",
    ),
    Mutation(
        "cpu pages: the memory that tensors share goes with the first of them",
        "csrc/cpu/runtime/allocator.cpp", "if (--shared->left > 0) {", "if (--shared->left + 1 < shared->parts.size()) {",
        "tests/openmythos_kernels/runtime/test_allocator.py",
    ),
    Mutation(
        "cpu attention backward: the output made again is the last keys' alone",
        "csrc/cpu/mla/attention_backward.cpp", "block.out + q * v, v, queries, n, v / Vec::size(), true);",
        "block.out + q * v, v, queries, n, v / Vec::size(), false);",
        "tests/openmythos_kernels/nn/paths/test_mla_recompute.py -k same_gradients",
    ),
    Mutation(
        "cpu attention backward: a query that sees one key gets what rounding leaves",
        "csrc/cpu/mla/attention_backward.cpp", "return p.seen(b, i + t) == 1;", "return p.seen(b, i + t) < 0;",
        f"{_CHECKED} random_sizes and mla_attention",
    ),
    Mutation(
        "cpu projection: an input without rows leaves the weight's gradient as it was",
        "csrc/cpu/mla/linear.cpp", "return {dx, dweight.zero_()};", "return {dx, dweight};", f"{_BUDGET} mla_linear",
    ),
    Mutation(
        "cpu attention: on the diagonal a vector of queries too many is left out",
        "csrc/cpu/mla/attention.h", "blind(b, i, j) / Vec::size() * Vec::size());", "(blind(b, i, j) / Vec::size() + (last - j > 20)) * Vec::size());",
        f"{_BUDGET} mla_attention",
    ),
]
