"""Prefix language modelling: the beginning of a document is read in both directions, the rest is predicted.

Shapes: B sequences, T tokens, S segments of a sequence, N flattened targets, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmssl.data.batch import SequenceBatch
from lmssl.model.head import IGNORE, chunk_size, loss_and_correct, output_weight
from lmssl.objective.base import MicroBatch, SumObjective, as_tensors
from lmssl.objective.draws import uniforms
from lmssl.objective.masked import masked_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class PrefixObjective(SumObjective):
    """Each token after its segment's prefix is predicted from the prefix, read in both directions, and what follows it.

    The prefix's share of a segment is uniform between two ratios; it has at least one token, and leaves at least one.

    Source: the prefix language model of T5 (Raffel et al. 2020) and UniLM (Dong et al. 2019), and the S-denoiser of
    UL2 (Tay et al. 2022); differs in drawing the prefix per packed segment, keyed by (seed, position, segment), and in
    training a stock causal class.
    """

    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    surface_bytes: npt.NDArray[np.int64]
    """Bytes of text each id stands for."""
    seed: int
    min_prefix_ratio: float = 0.0
    max_prefix_ratio: float = 1.0

    @property
    def weights(self) -> Mapping[str, float]:
        """One term."""
        return {"prefix": 1.0}

    def prepare(self, batch: SequenceBatch, *, evaluation: bool = False) -> MicroBatch:
        """Targets are the ids after each segment's prefix, shifted by one."""
        ids_BT, segments_BT = batch.ids_BT, batch.segments_BT
        prefix_BT = self.prefixes(segments_BT, batch.positions_B, evaluation=evaluation)
        predicted_BT = (segments_BT != 0) & ~prefix_BT
        targets_BT = np.full_like(ids_BT, IGNORE)
        targets_BT[:, :-1][predicted_BT[:, 1:]] = ids_BT[:, 1:][predicted_BT[:, 1:]]
        inputs = {
            "ids_BT": ids_BT,
            "segments_BT": segments_BT,
            "offsets_BT": batch.offsets_BT,
            "prefix_BT": prefix_BT,
            "targets_BT": targets_BT,
        }
        num_targets = int(predicted_BT.sum())
        return MicroBatch(
            inputs=as_tensors(inputs),
            counts={"prefix": num_targets, "accuracy": num_targets},
            num_bytes=float(masked_bytes(batch, targets_BT, self.surface_bytes).sum()),
            num_padding_tokens=batch.num_padding_tokens,
        )

    def prefixes(
        self, segments_BT: npt.NDArray[np.int32], positions_B: npt.NDArray[np.int64], *, evaluation: bool
    ) -> npt.NDArray[np.bool_]:
        """Which tokens belong to the prefix of their segment, [B, T]; those of held-out text are drawn apart."""
        found_BT = np.zeros(segments_BT.shape, bool)
        purpose = "evaluated prefix" if evaluation else "prefix"
        for row, position in enumerate(positions_B.tolist()):
            lengths_S = np.bincount(segments_BT[row])[1:]
            if not len(lengths_S):
                continue
            low, high = self.min_prefix_ratio, self.max_prefix_ratio
            shares_S = low + (high - low) * uniforms(len(lengths_S), self.seed, purpose, position)
            tokens_S = np.maximum(1, np.minimum(lengths_S - 1, (shares_S * lengths_S).astype(np.int64)))
            ends_S = np.cumsum(lengths_S) - lengths_S + tokens_S
            index_T, segments_T = np.arange(segments_BT.shape[1]), segments_BT[row]
            found_BT[row] = (segments_T != 0) & (index_T < ends_S[segments_T - 1])
        return found_BT

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Summed cross-entropy of the tokens after the prefixes, and how many the model had right."""
        body = model.base_model(
            input_ids=inputs["ids_BT"],
            position_ids=inputs["offsets_BT"],
            attention_mask=None,
            use_cache=False,
            **prefix_kwargs(inputs["segments_BT"], inputs["prefix_BT"]),
        )
        targets_N = inputs["targets_BT"].reshape(-1)
        hidden_ND = body.last_hidden_state.reshape(targets_N.shape[0], -1)
        weight_VD = output_weight(model)
        chunk = chunk_size(targets_N.shape[0], weight_VD.shape[0], device=targets_N.device.type)
        nats, correct = loss_and_correct(hidden_ND, weight_VD, None, targets_N, chunk_targets=chunk)
        return {"prefix": nats, "accuracy": correct}


def prefix_kwargs(segments_BT: Tensor, prefix_BT: Tensor) -> dict[str, Any]:
    """Keyword arguments for a model's forward: tokens see earlier ones of their document, and its whole prefix.

    The mask is a matrix [B, 1, T, T] on every device and at every length.

    Args:
        segments_BT: integers; equal numbers are one document, 0 is padding (which sees only padding).
        prefix_BT: bool; tokens that all of their document may attend to.
    """
    index_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    seen_BTT = prefix_BT[:, None, :] | (index_T[:, None] >= index_T[None, :])
    mask_BTT = seen_BTT & (segments_BT[:, :, None] == segments_BT[:, None, :])
    # Not "causal", although most of it is: that word lets kernels leave later keys out without asking the mask.
    return {"document_mask": mask_BTT[:, None], "document_segments": None, "document_causal": False}
