"""Experts without gradients on a CPU, in one call of the extension.

For one token, Python takes as long as the arithmetic. So the extension asks for the router's logits and the chosen
experts' weights while other threads begin with the shared experts: no op could, and only chosen experts are judged.
"""

from __future__ import annotations

from torch import Tensor

from openmythos_kernels.nn.call import Call
from openmythos_kernels.nn.paths import moe_experts
from openmythos_kernels.nn.paths.moe_experts import expert_weights, layer_obstacle, replaced
from openmythos_kernels.runtime import extension
from openmythos_kernels.runtime.backends import Choice, forced

WHEN = "no gradients, on a CPU"


def choice(layer) -> Choice:
    found = moe_experts.choice(layer)
    if not found.fast or found.backend == "cpu":
        return found
    return Choice("reference", "weights on a GPU")


def refuses(call: Call) -> str:
    if call.grad or call.compiling:
        return "gradients or torch.compile, whose graph must see all experts"
    if type(call.x) is not Tensor or not call.x.is_cpu:
        return "x is not a plain CPU tensor"
    if extension.module is None or forced() is not None:
        return extension.reason or "a backend is forced"
    if call.module.exchange is not None:
        return moe_experts.DIVIDED
    if call.module.scores is not None:
        return "router scores are recorded"
    return "a transform" if call.transformed else layer_obstacle(call.module)


def run(call: Call) -> Tensor:
    layer, x = call.module, call.x
    parts = layer._modules
    shared = parts["shared_experts"]._modules.values()

    def weights(used: list[int]):
        experts = list(parts["routed_experts"]._modules.values())
        chosen = [experts[e] for e in used]
        # Recheck the shared experts here, while other threads compute.
        return None if replaced(shared) or replaced(chosen) else expert_weights(chosen)

    try:
        begun = expert_weights(shared)
    except (AttributeError, KeyError):  # not three linear maps
        return layer.reference(call)
    done = extension.module.moe_inference(x, parts["router"], layer._buffers["router_bias"], layer.topk, begun, weights)
    if done is NotImplemented:  # x holds no numbers: fake, traced, batched
        return done
    if done is None:  # something does not fit: the reference computes it, or says what
        return layer.reference(call)
    y, expert_idx, load = done
    layer.record_load(expert_idx, load)
    return y
