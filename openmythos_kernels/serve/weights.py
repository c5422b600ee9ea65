"""The weights of a model to be served."""

from __future__ import annotations

from typing import Any

from openmythos_kernels.nn.model_weights import ModelWeights, obstacle_of


class Weights(ModelWeights):
    """`ModelWeights` of a model that the ops can compute.

    Raises:
        ValueError: the ops cannot stand in for a part of the model.
    """

    def __init__(self, model: Any):
        if reason := obstacle_of(model):
            raise ValueError(f"model: cannot be served: {reason}")
        super().__init__(model)
