"""BERT's two tasks at once: masked tokens, and whether the second half of a segment follows the first.

Shapes: B sequences, T tokens, P places for pairs in a sequence, N = B * P, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lmssl.data.batch import SequenceBatch
from lmssl.model.head import IGNORE
from lmssl.objective.base import MicroBatch, as_tensors
from lmssl.objective.masked import MaskedObjective, masked_loss
from lmssl.objective.pairs import Pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False, kw_only=True)
class SentenceObjective(MaskedObjective):
    """Masked tokens of pairs of sentences, and a yes or no at each [CLS].

    Source: BERT (Devlin et al. 2019) for `next` and ALBERT (Lan et al. 2020) for `order`, both with weight 1 and label
    0 for what follows. Differs in what a sentence is: half of a segment, cut at a word. In `next` BERT takes B from a
    random document of the corpus; here segments of a sequence exchange theirs, so every token is read once, rows keep
    their length, and the only segment of a sequence has no target.
    """

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "sentence_accuracy", "paired_ratio")
    pairs: Pairs

    @property
    def weights(self) -> Mapping[str, float]:
        """Tokens, then pairs."""
        return {"masked": 1.0, "sentence": 1.0}

    def prepare(self, batch: SequenceBatch, *, evaluation: bool = False) -> MicroBatch:
        """Segments become pairs, then tokens are hidden."""
        paired = self.pairs.arrange(batch, evaluation=evaluation)
        micro = super().prepare(paired.batch, evaluation=evaluation)
        inputs = {"types_BT": paired.types_BT, "heads_BP": paired.places_BP, "follows_BP": paired.targets_BP}
        num_pairs = int((paired.targets_BP != IGNORE).sum())
        return replace(
            micro,
            inputs=micro.inputs | as_tensors(inputs),
            counts=micro.counts
            | {"sentence": num_pairs, "sentence_accuracy": num_pairs, "paired_ratio": paired.num_segments},
        )

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Summed cross-entropies at hidden tokens and at pairs, then how many of each are right, and pairs."""
        from lmssl.model.encoder import encode, sentence_logits

        places_BC = inputs["places_BC"]
        hidden_BND = encode(
            model,
            inputs["ids_BT"],
            inputs["segments_BT"],
            inputs["offsets_BT"],
            types_BT=inputs["types_BT"],
            starts_K=inputs.get("document_starts"),
            places_BC=torch.cat([places_BC, inputs["heads_BP"]], dim=1),
        )
        hidden_BCD, hidden_BPD = hidden_BND.tensor_split([places_BC.shape[1]], dim=1)
        loss, correct = masked_loss(model, hidden_BCD.flatten(0, 1), inputs["targets_BC"].flatten())
        logits_N2 = sentence_logits(model, hidden_BPD.flatten(0, 1))
        targets_N = inputs["follows_BP"].reshape(-1)
        return {
            "masked": loss,
            "sentence": F.cross_entropy(logits_N2, targets_N, ignore_index=IGNORE, reduction="sum"),
            "accuracy": correct,
            "sentence_accuracy": (logits_N2.argmax(-1) == targets_N).sum().float(),
            "paired_ratio": (targets_N != IGNORE).sum().float(),
        }
