"""Bodies and heads of stock bidirectional classes: hidden states under document attention, logits at targets only.

The classes name their parts differently; the tables here say which part is which, and the tests hold them to the
stock losses. Tokens of a document are at positions 0, 1, ... wherever the document stands in its sequence.

Shapes: B sequences, T tokens, S tokens of an encoder, N targets, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lmssl.errors import ModelError
from lmssl.model.attention import document_kwargs
from lmssl.model.last_layer import chooses
from lmssl.model.layers import at_places

ROBERTA_KINDS = ("roberta", "xlm-roberta", "camembert")
"""Kinds that number positions from the pad id + 1 on."""
MASKED_KINDS = ("bert", *ROBERTA_KINDS, "electra", "modernbert", "eurobert", "distilbert")
"""Kinds whose body and head are known here."""


@dataclass(frozen=True)
class MaskedHead:
    """A masked-token head in parts: `transform(hidden_ND) @ weight_VD.T + bias_V` are the stock logits."""

    transform: Callable[[Tensor], Tensor]
    weight_VD: Tensor
    """Its width is the embedding's, which in electra is not the hidden states'."""
    bias_V: Tensor | None


def encode(
    model: PreTrainedModel,
    ids_BT: Tensor,
    segments_BT: Tensor,
    offsets_BT: Tensor,
    *,
    documents: bool = True,
    types_BT: Tensor | None = None,
    starts_K: Tensor | None = None,
    places_BC: Tensor | None = None,
) -> Tensor:
    """Hidden states [B, T, D] of the body of a bidirectional model, or [B, C, D] at some places.

    Args:
        segments_BT: integers; equal numbers are one document, 0 is padding.
        offsets_BT: position of each token in its document, from 0 on; in its sequence if not `documents`.
        documents: tokens see their own document only; otherwise every token of the sequence that is not padding.
        types_BT: which sentence of a pair each token is of; None: the first.
        starts_K: as in `document_kwargs`.
        places_BC: int64, where hidden states are wanted, which may spare work on others; None: everywhere.
    """
    if model.config.model_type in ROBERTA_KINDS:
        offsets_BT = offsets_BT + (model.config.pad_token_id + 1)
    kwargs = document_kwargs(segments_BT, causal=False, documents=documents, starts_K=starts_K)
    if types_BT is not None:
        kwargs["token_type_ids"] = types_BT
    if places_BC is not None and chooses(model):
        kwargs["document_places"] = places_BC
    body = model.base_model(input_ids=ids_BT, position_ids=offsets_BT, attention_mask=None, **kwargs)
    hidden: Tensor = body.last_hidden_state
    return hidden if places_BC is None or "document_places" in kwargs else at_places(hidden, places_BC)


def masked_head(model: PreTrainedModel) -> MaskedHead:
    """The head of a stock masked model.

    Raises:
        ModelError: a class whose head is not known here.
    """
    stock: Any = model
    kind = stock.config.model_type
    if kind == "bert":  # also as BertForPreTraining
        head = stock.cls.predictions
        return _head(head.transform, head.decoder)
    if kind in ROBERTA_KINDS:
        head = stock.lm_head
        return _head(_Chain(head.dense, nn.functional.gelu, head.layer_norm), head.decoder)
    if kind == "electra":
        return _head(stock.generator_predictions, stock.generator_lm_head)
    if kind == "modernbert":
        return _head(stock.head, stock.decoder)
    if kind == "eurobert":
        return _head(nn.Identity(), stock.lm_head)
    if kind == "distilbert":
        return _head(_Chain(stock.vocab_transform, stock.activation, stock.vocab_layer_norm), stock.vocab_projector)
    raise ModelError(
        f"the masked head of kind {kind} is not known", where="model.kind", remedy=f"use {', '.join(MASKED_KINDS)}"
    )


def sentence_logits(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """Whether a pair's second sentence follows the first, from its [CLS]: float32 [N, 2], as `BertForPreTraining`."""
    stock: Any = model
    pooled_ND = stock.bert.pooler(hidden_ND[:, None])
    logits_N2: Tensor = stock.cls.seq_relationship(pooled_ND)
    return logits_N2.float()


def _head(transform: Callable[[Tensor], Tensor], decoder: nn.Linear) -> MaskedHead:
    return MaskedHead(transform, decoder.weight, decoder.bias)


@dataclass(frozen=True)
class _Chain:
    """Functions one after another, for heads whose parts are no module of their own."""

    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]
    third: Callable[[Tensor], Tensor]

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        return self.third(self.second(self.first(hidden_ND)))


def encode_decode(
    model: PreTrainedModel,
    ids_BS: Tensor,
    segments_BS: Tensor,
    decoder_ids_BT: Tensor,
    decoder_segments_BT: Tensor,
    *,
    documents: bool = True,
) -> Tensor:
    """Hidden states [B, T, D] of the decoder of a t5, umt5 or mt5, whose product with the head's weight are logits.

    Args:
        segments_BS: of the encoder's tokens; equal numbers are one document, 0 is padding.
        decoder_segments_BT: numbered as the encoder's; a decoder token sees the encoder's tokens of its document.
        documents: as in `encode`.
    """
    within = document_kwargs(segments_BS, causal=False, documents=documents)
    read = model.get_encoder()(input_ids=ids_BS, attention_mask=None, **within).last_hidden_state
    across = document_kwargs(decoder_segments_BT, causal=True, documents=documents, key_segments_BS=segments_BS)
    written = model.get_decoder()(
        input_ids=decoder_ids_BT, encoder_hidden_states=read, attention_mask=None, use_cache=False, **across
    )
    hidden_BTD: Tensor = written.last_hidden_state
    config = model.config
    scaled = config.model_type == "umt5" or getattr(config, "scale_decoder_outputs", False)
    return hidden_BTD * config.d_model**-0.5 if scaled else hidden_BTD
