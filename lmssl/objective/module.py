"""The one module that is prepared, compiled and trained: a stock model and its objective."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmssl.objective.base import EmbeddingObjective, Objective


class LossModule(nn.Module):
    """A stock model whose forward returns an objective's summed losses, or its embeddings.

    Nothing outside calls the body or reads a weight, so that every wrapper (DDP, FSDP2, DeepSpeed) sees one forward.
    """

    def __init__(self, model: PreTrainedModel, objective: Objective, *, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.bf16 = bf16

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Summed loss of each term, or `{"embeddings": [rows, D]}` for an `EmbeddingObjective`."""
        device = next(iter(inputs.values())).device
        with autocast(device, self.bf16):
            if isinstance(self.objective, EmbeddingObjective):
                return {"embeddings": self.objective.embed(self.model, inputs)}
            return self.objective.sums(self.model, inputs)


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    """Matrix products in bfloat16, everything else and the weights in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
