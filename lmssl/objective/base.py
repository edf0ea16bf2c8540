"""The two shapes an objective can have; the step knows nothing else.

A `SumObjective` returns named sums of losses whose counts are known from the data alone, so that the step can divide
by global counts. An `EmbeddingObjective` has one loss over the embeddings of the whole batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lmssl.data.batch import SequenceBatch

if TYPE_CHECKING:  # loader workers unpickle objectives and must not pay for importing transformers
    from transformers import PreTrainedModel


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
    """Tokens that hold no text."""


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
