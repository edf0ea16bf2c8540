"""Masked-token prediction on packed documents, with the head at the targets only.

Shapes: B sequences, T tokens, C targets of a sequence at most, D width, N = B * C.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lmssl.data.batch import SequenceBatch
from lmssl.model.head import IGNORE, chunk_size, loss_and_correct
from lmssl.model.layers import at_places
from lmssl.objective.base import MicroBatch, SumObjective, as_tensors
from lmssl.objective.masking import Masking

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class MaskedObjective(SumObjective):
    """Hidden tokens are predicted from both sides of their document.

    With `document_attention` off a sequence is one stream, as in `run_mlm.py`.
    Source: BERT (Devlin et al. 2019); differs in drawing masks anew for every position of the order, as RoBERTa does,
    and in a fixed number of targets per sequence.
    """

    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    masking: Masking
    surface_bytes: npt.NDArray[np.int64]
    """Bytes of text each id stands for."""
    document_attention: bool = True

    @property
    def weights(self) -> Mapping[str, float]:
        """One term."""
        return {"masked": 1.0}

    def prepare(self, batch: SequenceBatch, *, evaluation: bool = False) -> MicroBatch:
        """Some tokens become targets and are hidden; which ones depends on the seed and the position alone."""
        masked = self.masking.mask(batch.ids_BT, batch.segments_BT, batch.positions_B, evaluation=evaluation)
        num_targets = int((masked.targets_BC != IGNORE).sum())
        inputs = {
            "ids_BT": masked.ids_BT,
            "segments_BT": batch.segments_BT,
            "offsets_BT": stream_offsets(batch) if not self.document_attention else batch.offsets_BT,
            "places_BC": masked.places_BC,
            "targets_BC": masked.targets_BC,
        }
        return MicroBatch(
            inputs=as_tensors(inputs),
            counts={"masked": num_targets, "accuracy": num_targets},
            num_bytes=float(masked_bytes(batch, masked.targets_BC, self.surface_bytes).sum()),
            num_padding_tokens=batch.num_padding_tokens,
        )

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Summed cross-entropy at the targets, and how many of them the model ranks first."""
        from lmssl.model.encoder import encode  # here, for loader workers must not pay for importing transformers

        hidden_BCD = encode(
            model,
            inputs["ids_BT"],
            inputs["segments_BT"],
            inputs["offsets_BT"],
            documents=self.document_attention,
            starts_K=inputs.get("document_starts"),
            places_BC=inputs["places_BC"],
        )
        loss, correct = masked_loss(model, hidden_BCD.flatten(0, 1), inputs["targets_BC"].flatten())
        return {"masked": loss, "accuracy": correct}


def masked_loss(model: PreTrainedModel, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss in nats at the targets, and how many of them the model ranks first: float32 scalars."""
    from lmssl.model.encoder import masked_head

    head = masked_head(model)
    chunk = chunk_size(targets_N.shape[0], head.weight_VD.shape[0], device=targets_N.device.type)
    return loss_and_correct(head.transform(hidden_ND), head.weight_VD, head.bias_V, targets_N, chunk_targets=chunk)


def at_targets(hidden_BTD: Tensor, places_BC: Tensor) -> Tensor:
    """Hidden states at the places of the targets, shape [N, D]."""
    return at_places(hidden_BTD, places_BC).flatten(0, 1)


def masked_bytes(
    batch: SequenceBatch, targets_BC: npt.NDArray[np.int64], surface_bytes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Bytes of the masked text of each row, shape [B]: the row's bytes in proportion to the length of its tokens."""
    length_B = _surface(batch.ids_BT, batch.segments_BT > 0, surface_bytes)
    hidden_B = _surface(targets_BC, targets_BC != IGNORE, surface_bytes)
    shares_B: npt.NDArray[np.float64] = batch.num_bytes_B * hidden_B / np.maximum(length_B, 1)
    return shares_B


def stream_offsets(batch: SequenceBatch) -> npt.NDArray[np.int64]:
    """Places counted through the whole sequence instead of its segments, shape [B, T]."""
    rows, length = batch.ids_BT.shape
    return np.tile(np.arange(length, dtype=np.int64), (rows, 1))


def _surface(
    ids: npt.NDArray[np.int64], counted: npt.NDArray[np.bool_], surface_bytes: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    total: npt.NDArray[np.int64] = np.where(counted, surface_bytes[np.where(counted, ids, 0)], 0).sum(axis=1)
    return total
