"""Small faults in the Triton kernels that decode whole layers, and in who chooses them."""

from tests.mutations.mutation import Mutation

_KERNELS = "openmythos_kernels/ops/layer/kernels"
_MODEL = "tests/openmythos_kernels/nn/paths/test_decode_on_gpu.py -k references"
_COUNT = "tests/openmythos_kernels/nn/paths/test_decode_on_gpu.py -k"
_BLOCK = "tests/triton_on_cpu/test_specifications.py -k interpreter-block_decode-float32-more"
_LOOP = "tests/triton_on_cpu/test_specifications.py -k ptxsim-loop_decode-bfloat16-residual"

MUTATIONS = [
    Mutation(
        "decode in Triton: a token does not see itself",
        f"{_KERNELS}/attention.py",
        "tl.store(seen + row, place + 1)",
        "tl.store(seen + row, place)",
        _MODEL,
    ),
    Mutation(
        "decode in Triton: a token without room is written behind its row",
        f"{_KERNELS}/attention.py",
        "if (place >= 0) & (place < capacity):",
        "if place >= 0:",
        "tests/openmythos_kernels/ops/layer/test_decode_kernels.py -k without_room",
    ),
    Mutation(
        "decode in Triton: queries are rotated the other way",
        f"{_KERNELS}/attention.py",
        "(even * sin + odd * cos)",
        "(odd * cos - even * sin)",
        _MODEL,
    ),
    Mutation(
        "decode in Triton: values are made by kv_up's rows of keys",
        f"{_KERNELS}/attention.py",
        "(row % H * (NOPE + V) + NOPE + v)",
        "(row % H * (NOPE + V) + v)",
        _MODEL,
    ),
    Mutation(
        "decode in Triton: the norm is of the sum of squares",
        f"{_KERNELS}/normed.py",
        "tl.sum(squares, 1) / D + eps",
        "tl.sum(squares, 1) + eps",
        _BLOCK,
    ),
    Mutation(
        "decode in Triton: an expert that two tokens chose is computed for neither",
        f"{_KERNELS}/experts.py",
        "(same & (pair < p))",
        "(same & (pair != p))",
        _MODEL,
    ),
    Mutation(
        "decode in Triton: every expert is written to the first slot",
        f"{_KERNELS}/experts.py",
        "slot = tl.max(tl.where(same, k, 0), 1)",
        "slot = tl.max(tl.where(same, 0, 0), 1)",
        _BLOCK,
    ),
    Mutation(
        "decode in Triton: the first shared expert is summed for all",
        f"{_KERNELS}/step.py",
        "(s * tl.cast(N, tl.int64) + n) * D",
        "n * D",
        _BLOCK,
    ),
    Mutation(
        "decode in Triton: every loop has the first loop's LoRA",
        f"{_KERNELS}/step.py",
        "tl.load(lora_scale + depth * RANK + k)",
        "tl.load(lora_scale + k)",
        _MODEL,
    ),
    Mutation(
        'decode in Triton: with injection="residual" the block\'s output is injected',
        f"{_KERNELS}/step.py",
        "state -= _columns(u + n * D, c, inside)",
        "state -= 0.0",
        _LOOP,
    ),
    Mutation(
        "decode in Triton: positions run as if nothing were summed before",
        "openmythos_kernels/ops/layer/launch/decode.py",
        "FIRST=t == 0,",
        "FIRST=True,",
        _MODEL,
    ),
    Mutation(
        "decode in Triton: any number of rows goes through kernels of few",
        "openmythos_kernels/nn/paths/decode_block.py",
        "len(call.x) > GPU_ROWS",
        "len(call.x) > 2 * GPU_ROWS",
        f"{_COUNT} more_rows",
    ),
    Mutation(
        "decode in Triton: the loops count as one reader of the lengths",
        "openmythos_kernels/nn/paths/decode_loop.py",
        "h.device, layers=len(entries)",
        "h.device",
        "tests/openmythos_kernels/nn/paths/test_cuda_graph.py -k equal_the_models",
    ),
    Mutation(
        "decode in Triton: chosen without the switch",
        "openmythos_kernels/runtime/backends.py",
        "if op in UNPROVEN and not unproven.allowed():",
        "if op in UNPROVEN and unproven.allowed() is None:",
        "tests/openmythos_kernels/runtime/test_backends.py -k without_the_switch",
    ),
]
