"""The loop step with the LoRA's down-projection inside, so that the block's output is read once. CPU only: on GPUs the
library's product is as fast.

With `raw = f @ down^T` it is `loop_step` with `lora_hidden = raw * scale`; in the backward pass likewise.
"""

from __future__ import annotations

from torch import Tensor

from openmythos_kernels.ops.derivatives import Again
from openmythos_kernels.ops.loop import formula, step
from openmythos_kernels.ops.op import Op


def loop_lora_step(
    h: Tensor,
    e: Tensor,
    f: Tensor,
    down: Tensor,
    scale: Tensor,
    h_out: Tensor,
    cumulative_p: Tensor,
    running: Tensor,
    ponder: Tensor,
    lora_B: Tensor,
    log_A: Tensor,
    log_dt: Tensor,
    B: Tensor,
    halt_weight: Tensor,
    halt_bias: Tensor,
    norm_weight: Tensor,
    emb: Tensor,
    loop: int,
    threshold: float,
    spend_remainder: bool,
    enter: bool,
    eps: float,
) -> step.LoopStep:
    """As `openmythos_kernels.ops.loop.loop_step`, with the LoRA's own weights in place of the coordinates of f.

    Args:
        down: (rank, D). scale: (rank,), this loop's. Both in h's dtype.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    state = (h_out, cumulative_p, running, ponder)
    weights = (lora_B, log_A, log_dt, B, halt_weight, halt_bias, norm_weight, emb)
    numbers = (loop, threshold, spend_remainder, enter, eps)
    return step.run(LOOP_LORA_STEP, (h, e, f), {"down": down, "scale": scale}, state, weights, numbers)


def _fake(h, e, f, down, scale, *rest):
    return *step.fake_step(h, e, f, None, *rest), h.new_empty(*h.shape[:-1], len(down))


def _setup_context(ctx, inputs, output):
    f, down, scale = inputs[2:5]
    raw = output[-1]
    step.save(ctx, inputs, output, (f, raw, down, scale))


def _fake_backward(*args):
    h, e, f, _, down, scale = args[5:11]
    return step.fake_gradients((h, e, f, down, scale), args[11:])


LOOP_LORA_STEP = Op(
    f"loop_lora_step(Tensor h, Tensor e, Tensor f, Tensor down, Tensor scale, {step.STATE_SCHEMA}, "
    f"{step.WEIGHTS_SCHEMA}, {step.NUMBERS_SCHEMA}) -> ({step.RESULTS_SCHEMA}, Tensor raw)",
    fake=_fake,
    setup_context=_setup_context,
    backward=lambda ctx, *grads: step.backward_of(_gradients, ctx, grads),
    formula=formula.lora_step,
)
LOOP_LORA_STEP_BACKWARD = Op(
    f"loop_lora_step_backward({step.GRADS_SCHEMA}, Tensor h, Tensor e, Tensor f, Tensor raw, Tensor down, "
    f"Tensor scale, {step.SAVED_SCHEMA}) "
    f"-> (Tensor h, Tensor e, Tensor f, Tensor down, Tensor scale, {step.GRADIENTS_SCHEMA})",
    fake=_fake_backward,
)
_gradients: Again = Again(lambda halt_bias, eps, *args: LOOP_LORA_STEP_BACKWARD(*args), formula.lora_step_backward)
