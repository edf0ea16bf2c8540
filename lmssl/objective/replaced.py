"""Replaced-token detection on packed documents: a generator fills masks, the model finds what it filled.

Shapes: B sequences, T tokens, C targets of the generator in a sequence at most, D width, N = B * C.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from lmssl.data.batch import SequenceBatch
from lmssl.model.head import IGNORE, chunk_size, loss_and_correct
from lmssl.objective.base import MicroBatch, SumObjective, as_tensors
from lmssl.objective.masked import masked_bytes, stream_offsets
from lmssl.objective.masking import Draws, Masked, Masking

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class ReplacedObjective(SumObjective):
    """A generator predicts hidden tokens; for every token the model says whether the generator's sample replaced it.

    A sample that equals the token it stands for counts as original. Every token of a segment counts, [CLS] and [SEP]
    too, padding does not. Samples are a function of seed, position and weights.
    Source: ELECTRA (Clark et al. 2020) and its released code; differs in the exact number of targets per sequence, and
    in that none is drawn twice.
    """

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "detection_accuracy", "replaced_ratio")
    masking: Masking
    surface_bytes: npt.NDArray[np.int64]
    """Bytes of text each id stands for."""
    detection_weight: float = 50.0
    temperature: float = 1.0
    document_attention: bool = True

    @property
    def weights(self) -> Mapping[str, float]:
        """The generator's loss, then the model's."""
        return {"masked": 1.0, "replaced": self.detection_weight}

    def prepare(self, batch: SequenceBatch, *, evaluation: bool = False) -> MicroBatch:
        """Targets of the generator as in `masked`, and keys of its samples."""
        masked = self.masking.mask(batch.ids_BT, batch.segments_BT, batch.positions_B, evaluation=evaluation)
        num_targets, num_tokens = int((masked.targets_BC != IGNORE).sum()), int((batch.segments_BT != 0).sum())
        inputs = {
            "ids_BT": masked.ids_BT,
            "original_BT": batch.ids_BT,
            "segments_BT": batch.segments_BT,
            "offsets_BT": stream_offsets(batch) if not self.document_attention else batch.offsets_BT,
            "places_BC": masked.places_BC,
            "targets_BC": masked.targets_BC,
            "slots_BT": _slots(masked),
            "keys_BC2": self._keys(batch, masked.places_BC, evaluation),
        }
        return MicroBatch(
            inputs=as_tensors(inputs),
            counts={
                "masked": num_targets,
                "replaced": num_tokens,
                "accuracy": num_targets,
                "detection_accuracy": num_tokens,
                "replaced_ratio": num_tokens,
            },
            num_bytes=float(masked_bytes(batch, masked.targets_BC, self.surface_bytes).sum()),
            num_padding_tokens=batch.num_padding_tokens,
        )

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Summed cross-entropy of the generator and of the model's yes or no, then what they got right."""
        from lmssl.model.electra import ElectraPair, detections
        from lmssl.model.encoder import encode

        assert isinstance(model, ElectraPair)
        segments_BT, original_BT = inputs["segments_BT"], inputs["original_BT"]
        loss, correct, samples_BC = self._fill(model.generator, inputs)
        filled_BT = torch.where(
            inputs["slots_BT"] < 0, original_BT, samples_BC.gather(1, inputs["slots_BT"].clamp(min=0))
        )
        kept_BT, replaced_BT = segments_BT != 0, (filled_BT != original_BT)
        hidden_BTD = encode(
            model.discriminator,
            filled_BT,
            segments_BT,
            inputs["offsets_BT"],
            documents=self.document_attention,
            starts_K=inputs.get("document_starts"),
        )
        logits_BT = detections(model, hidden_BTD)
        losses_BT = F.binary_cross_entropy_with_logits(logits_BT, replaced_BT.float(), reduction="none")
        return {
            "masked": loss,
            "replaced": (losses_BT * kept_BT).sum(),
            "accuracy": correct,
            "detection_accuracy": (((logits_BT > 0) == replaced_BT) & kept_BT).sum().float(),
            "replaced_ratio": replaced_BT.sum().float(),
        }

    def _fill(self, generator: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The generator's summed loss, how many targets it ranks first, and a sample for each; int64 [B, C]."""
        from lmssl.model.electra import sampled_tokens
        from lmssl.model.encoder import encode, masked_head

        places_BC = inputs["places_BC"]
        hidden_BCD = encode(
            generator,
            inputs["ids_BT"],
            inputs["segments_BT"],
            inputs["offsets_BT"],
            documents=self.document_attention,
            starts_K=inputs.get("document_starts"),
            places_BC=places_BC,
        )
        head = masked_head(generator)
        hidden_ND, targets_N = head.transform(hidden_BCD.flatten(0, 1)), inputs["targets_BC"].flatten()
        chunk = chunk_size(targets_N.shape[0], head.weight_VD.shape[0], device=targets_N.device.type)
        loss, correct = loss_and_correct(hidden_ND, head.weight_VD, head.bias_V, targets_N, chunk_targets=chunk)
        keys_N2 = inputs["keys_BC2"].reshape(-1, 2)
        samples_N = sampled_tokens(hidden_ND, head.weight_VD, head.bias_V, keys_N2, temperature=self.temperature)
        return loss, correct, samples_N.reshape(places_BC.shape)

    def _keys(self, batch: SequenceBatch, places_BC: npt.NDArray[np.int64], evaluation: bool) -> npt.NDArray[np.int64]:
        """Two random numbers of 31 bits for each target; shape [B, C, 2]."""
        purpose = "samples of evaluation" if evaluation else "samples"
        bits_BC = Draws(self.masking.seed, purpose, batch.positions_B).bits("keys", places_BC.shape[1])
        low = np.uint64(2**31 - 1)
        keys_BC2: npt.NDArray[np.int64] = np.stack([bits_BC & low, bits_BC >> np.uint64(33)], axis=-1).astype(np.int64)
        return keys_BC2


def _slots(masked: Masked) -> npt.NDArray[np.int64]:
    """Where each token stands among the targets of its row, -1 if it is none; shape [B, T]."""
    slots_BT = np.full(masked.ids_BT.shape, -1, np.int64)
    rows_N, slots_N = np.nonzero(masked.targets_BC != IGNORE)
    slots_BT[rows_N, masked.places_BC[rows_N, slots_N]] = slots_N
    return slots_BT
