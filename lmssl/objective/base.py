"""The two shapes an objective can have; the step knows nothing else.

A `SumObjective` returns named sums of losses whose counts are known from the data alone, so that the step can divide
by global counts. An `EmbeddingObjective` has one loss over the embeddings of the whole batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lmssl.data.batch import SequenceBatch

if TYPE_CHECKING:  # loader workers unpickle objectives and must not pay for importing transformers or torch's compiler
    from transformers import PreTrainedModel


_COLUMNS = 64
"""Lengths are multiples of this, so that kernels and allocators meet few shapes."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward on one device reads, made from a `SequenceBatch` by an objective."""

    inputs: dict[str, Tensor]
    """Tensors with the micro-batch as their first dimension, on CPU until the step moves them."""
    counts: dict[str, int]
    """Targets of each term, and of each metric."""
    num_bytes: float
    """Bytes of text that the first term's loss is spread over."""
    num_padding_tokens: int
    """Tokens of its sequences that hold no text; empty rows do not count."""

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The inputs on a device; copied to a GPU without waiting, and there with the `document_starts` of segments."""
        if device.type != "cuda":
            return {name: tensor.to(device) for name, tensor in self.inputs.items()}
        inputs = dict(self.inputs)
        if "segments_BT" in inputs:
            from lmssl.model.varlen import document_starts  # here, see above

            inputs["document_starts"] = document_starts(inputs["segments_BT"])
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in inputs.items()}

    def unpadded(self) -> MicroBatch:
        """The same without the columns in which every row is padding, but for whole blocks of `_COLUMNS`.

        Losses are the same sums, of fewer zeros. Rows of an encoder and a decoder (span) stay as they are: their
        lengths were chosen from a few already.
        """
        segments_BT = self.inputs.get("segments_BT")
        if segments_BT is None:
            return self
        num_columns = int((segments_BT != 0).any(0).sum())  # padding stands at the end of rows
        num_columns = min(segments_BT.shape[1], -(-max(1, num_columns) // _COLUMNS) * _COLUMNS)
        # The suffix of a name is its shape.
        inputs = {k: v[:, :num_columns].contiguous() if k.endswith("_BT") else v for k, v in self.inputs.items()}
        return replace(self, inputs=inputs)


def as_tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """NumPy arrays of any types as tensors on CPU, sharing their memory where they are contiguous."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


class SumObjective(ABC):
    """Losses that are sums over targets: next-token, masked, replaced-token and their like."""

    metrics: ClassVar[tuple[str, ...]] = ()
    """Further terms that are measured and not trained; each sum / its count is shown under its name."""

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, float]:
        """Terms and their weights in the total loss; the first is the one that bits per byte are computed from."""

    @abstractmethod
    def prepare(self, batch: SequenceBatch, *, evaluation: bool = False) -> MicroBatch:
        """Inputs, targets and their counts; runs in loader workers, so it must be picklable and quick.

        Args:
            evaluation: the batch is of held-out text, and a position is its index there.
        """

    @abstractmethod
    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Summed loss of each term in nats, then the sum of each metric, float32 scalars."""


class EmbeddingObjective(ABC):
    """One loss over the embeddings of the whole batch: contrastive objectives."""

    @abstractmethod
    def prepare(self, batch: SequenceBatch, *, evaluation: bool = False) -> MicroBatch:
        """Inputs of `embed`; counts may be empty."""

    @abstractmethod
    def embed(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """Embeddings [rows, D] of one micro-batch."""

    @abstractmethod
    def loss(self, embeddings: Tensor) -> Tensor:
        """Mean loss of the whole batch, from the rows of all micro-batches of all devices in position order."""


Objective = SumObjective | EmbeddingObjective


@dataclass(frozen=True)
class Unpadded:
    """An objective's `prepare` for backends that take micro-batches of any shape: each ends with its longest row."""

    objective: Objective

    def __call__(self, batch: SequenceBatch, *, evaluation: bool = False) -> MicroBatch:
        """See `prepare`; picklable as the objective is."""
        return self.objective.prepare(batch, evaluation=evaluation).unpadded()
