"""Next-token and masked-next-token prediction by one decoder.

Shapes: B sequences, T tokens, C masked targets of a sequence at most, N flattened targets, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lmssl.data.batch import SequenceBatch
from lmssl.data.order import exactly
from lmssl.model.head import IGNORE, chunk_size, loss_and_correct, output_weight
from lmssl.objective.base import MicroBatch, SumObjective, as_tensors
from lmssl.objective.draws import uniforms
from lmssl.objective.masking import Masking
from lmssl.objective.prefix import prefix_kwargs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class HybridObjective(SumObjective):
    """Of some sequences each token predicts the next one; of the others the masked tokens are predicted.

    A masked token is predicted where the one before it stands, as a next token is, so that one head serves both; a
    segment's first token is therefore never a target. Sequences with masks are read in both directions.

    Source: GPT-BERT (Charpentier & Samuel 2024); differs in choosing by position, evenly spread, and not by device,
    and in exact means: each kind's loss is divided by the number of its targets in the whole batch. As there, a kind
    weighs as much in the loss as its share of the sequences.
    """

    metrics: ClassVar[tuple[str, ...]] = ("causal_accuracy", "masked_accuracy")
    masking: Masking
    seed: int
    masked_ratio: float

    @property
    def weights(self) -> Mapping[str, float]:
        """Each kind's share of the sequences."""
        return {"causal": 1.0 - self.masked_ratio, "masked": self.masked_ratio}

    def prepare(self, batch: SequenceBatch, *, evaluation: bool = False) -> MicroBatch:
        """Ids and targets of either kind; held-out sequences come twice, once as each."""
        if evaluation:
            masked_B = np.repeat([False, True], len(batch.ids_BT))
            batch = _twice(batch)
        else:
            masked_B = self.is_masked(batch.positions_B)
        causal_BT = _next_tokens(batch, ~masked_B)
        ids_BT, places_BC, masked_BC = self._mask(batch, masked_B, evaluation)
        inputs = {
            "ids_BT": ids_BT,
            "segments_BT": batch.segments_BT,
            "offsets_BT": batch.offsets_BT,
            "masked_B": masked_B,
            "causal_BT": causal_BT,
            "places_BC": places_BC,
            "masked_BC": masked_BC,
        }
        num_causal, num_masked = int((causal_BT != IGNORE).sum()), int((masked_BC != IGNORE).sum())
        return MicroBatch(
            inputs=as_tensors(inputs),
            counts={
                "causal": num_causal,
                "masked": num_masked,
                "causal_accuracy": num_causal,
                "masked_accuracy": num_masked,
            },
            num_bytes=float(batch.num_bytes_B[~masked_B].sum()),
            num_padding_tokens=batch.num_padding_tokens,
        )

    def is_masked(self, positions_B: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which positions are masked: of any run of positions the recipe's share, to within one."""
        ratio = exactly(self.masked_ratio)
        phase = int(uniforms(1, self.seed, "hybrid")[0] * ratio.denominator)
        # In Python's integers: the product passes 64 bits for long ratios.
        before, after = (
            [((position + step) * ratio.numerator + phase) // ratio.denominator for position in positions_B.tolist()]
            for step in (0, 1)
        )
        return np.array(after, dtype=np.int64) > np.array(before, dtype=np.int64)

    def _mask(
        self, batch: SequenceBatch, masked_B: npt.NDArray[np.bool_], evaluation: bool
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Ids [B, T] with masks in the masked rows; where their targets are predicted and what they are, [B, C]."""
        masked = self.masking.mask(batch.ids_BT, batch.segments_BT, batch.positions_B, evaluation=evaluation)
        first_BC = np.take_along_axis(batch.offsets_BT, masked.places_BC, axis=1) == 0
        targets_BC = np.where(first_BC | ~masked_B[:, None], IGNORE, masked.targets_BC)
        ids_BT = np.where(masked_B[:, None] & (batch.offsets_BT > 0), masked.ids_BT, batch.ids_BT)
        return ids_BT, np.maximum(masked.places_BC - 1, 0), targets_BC

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Summed cross-entropy of both kinds of targets, and how many of each the model had right."""
        whole_BT = inputs["masked_B"][:, None].expand(-1, inputs["ids_BT"].shape[1])
        body = model.base_model(
            input_ids=inputs["ids_BT"],
            position_ids=inputs["offsets_BT"],
            attention_mask=None,
            use_cache=False,
            **prefix_kwargs(inputs["segments_BT"], whole_BT),  # all of a masked sequence is its prefix
        )
        hidden_BTD = body.last_hidden_state
        weight_VD = output_weight(model)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        places_BCD = inputs["places_BC"][:, :, None].expand(-1, -1, hidden_BTD.shape[-1])
        kinds = {
            "causal": (hidden_BTD, inputs["causal_BT"]),
            "masked": (hidden_BTD.gather(1, places_BCD), inputs["masked_BC"]),
        }
        for name, (hidden, targets) in kinds.items():
            targets_N = targets.reshape(-1)
            hidden_ND = hidden.reshape(targets_N.shape[0], -1)
            chunk = chunk_size(targets_N.shape[0], weight_VD.shape[0], device=targets_N.device.type)
            found[name] = loss_and_correct(hidden_ND, weight_VD, None, targets_N, chunk_targets=chunk)
        losses = {name: nats for name, (nats, _) in found.items()}
        return losses | {f"{name}_accuracy": correct for name, (_, correct) in found.items()}


def _next_tokens(batch: SequenceBatch, rows_B: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The token after each one in its segment, in the given rows, else `IGNORE`; shape [B, T]."""
    ids_BT, segments_BT = batch.ids_BT, batch.segments_BT
    targets_BT = np.full_like(ids_BT, IGNORE)
    following = (segments_BT[:, 1:] != 0) & (segments_BT[:, 1:] == segments_BT[:, :-1]) & rows_B[:, None]
    targets_BT[:, :-1][following] = ids_BT[:, 1:][following]
    return targets_BT


def _twice(batch: SequenceBatch) -> SequenceBatch:
    """All rows, and then all rows again."""
    return SequenceBatch(
        np.tile(batch.ids_BT, (2, 1)),
        np.tile(batch.segments_BT, (2, 1)),
        np.tile(batch.offsets_BT, (2, 1)),
        np.tile(batch.positions_B, 2),
        np.tile(batch.num_bytes_B, 2),
    )
