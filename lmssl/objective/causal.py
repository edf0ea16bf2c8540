"""Next-token prediction on packed documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from lmssl.data.batch import SequenceBatch
from lmssl.model.head import IGNORE, chunk_size, output_weight, summed_cross_entropy
from lmssl.objective.base import MicroBatch, SumObjective, as_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CausalObjective(SumObjective):
    """Each token predicts the next one of its document.

    With `document_attention` off a sequence is one stream: tokens attend to and predict across document ends, as in
    GPT-2 and nanoGPT.
    """

    document_attention: bool = True

    @property
    def weights(self) -> Mapping[str, float]:
        """One term."""
        return {"causal": 1.0}

    def prepare(self, batch: SequenceBatch, *, evaluation: bool = False) -> MicroBatch:
        """Targets are the ids shifted by one; the last token of a document has none."""
        del evaluation  # nothing here is drawn
        ids_BT, segments_BT = batch.ids_BT, batch.segments_BT
        targets_BT = np.full_like(ids_BT, IGNORE)
        following = (segments_BT[:, 1:] != 0) & (segments_BT[:, :-1] != 0)
        if self.document_attention:
            following &= segments_BT[:, 1:] == segments_BT[:, :-1]
        targets_BT[:, :-1][following] = ids_BT[:, 1:][following]
        offsets_BT = batch.offsets_BT
        if not self.document_attention:
            offsets_BT = np.tile(np.arange(ids_BT.shape[1], dtype=np.int64), (ids_BT.shape[0], 1))
        inputs = {"ids_BT": ids_BT, "segments_BT": segments_BT, "offsets_BT": offsets_BT, "targets_BT": targets_BT}
        return MicroBatch(
            inputs=as_tensors(inputs),
            counts={"causal": int(following.sum())},
            num_bytes=float(batch.num_bytes_B.sum()),
            num_padding_tokens=batch.num_padding_tokens,
        )

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Summed next-token cross-entropy; hidden states meet the vocabulary chunk by chunk."""
        from lmssl.model.attention import document_kwargs  # here, for loader workers must not pay for the compiler

        targets_N = inputs["targets_BT"].reshape(-1)
        body = model.base_model(
            input_ids=inputs["ids_BT"],
            position_ids=inputs["offsets_BT"],
            attention_mask=None,
            use_cache=False,
            **document_kwargs(
                inputs["segments_BT"],
                causal=True,
                documents=self.document_attention,
                starts_K=inputs.get("document_starts"),
            ),
        )
        hidden_ND = body.last_hidden_state.reshape(targets_N.shape[0], -1)
        weight_VD = output_weight(model)
        chunk = chunk_size(targets_N.shape[0], weight_VD.shape[0], device=targets_N.device.type)
        return {"causal": summed_cross_entropy(hidden_ND, weight_VD, targets_N, chunk_targets=chunk)}
