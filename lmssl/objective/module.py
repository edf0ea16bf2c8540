"""The one module that is prepared, compiled and trained: a stock model and its objective."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmssl.objective.base import EmbeddingObjective, Objective

Function = Callable[[PreTrainedModel, dict[str, Tensor]], dict[str, Tensor]]


class LossModule(nn.Module):
    """A stock model whose forward returns an objective's summed losses, or its embeddings.

    Nothing outside calls the body or reads a weight, so that every wrapper (DDP, FSDP2, DeepSpeed) sees one forward.
    """

    def __init__(self, model: PreTrainedModel, objective: Objective, *, bf16: bool, fp16: bool = False) -> None:
        """Args: `bf16`, `fp16`: the type of matrix products; neither: float32."""
        super().__init__()
        self.model = model
        self.objective = objective
        self.dtype = torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32
        """Of matrix products."""

    def forward(self, inputs: dict[str, Tensor], function: Function | None = None) -> dict[str, Tensor]:
        """Summed loss of each term, or `{"embeddings": [rows, D]}` for an `EmbeddingObjective`.

        Args:
            function: what is computed instead, for evaluation: through here it meets whole weights under any wrapper.
        """
        device = next(iter(inputs.values())).device
        with autocast(device, self.dtype):
            if function is not None:
                return function(self.model, inputs)
            if isinstance(self.objective, EmbeddingObjective):
                return {"embeddings": self.objective.embed(self.model, inputs)}
            return self.objective.sums(self.model, inputs)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in a type of 16 bits, everything else and the weights in float32; float32: no change."""
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if half else torch.bfloat16, enabled=half)
