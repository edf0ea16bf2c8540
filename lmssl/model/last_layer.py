"""The last layer of a bidirectional model where hidden states are wanted, and nowhere else.

A masked model is asked for a seventh of its tokens. Keys and values of the last layer are read from all, but what
follows its attention works on each token alone, and is done for those that are asked for. Losses and gradients are
those of the whole layer; with a head at the targets, nothing else of the model is computed in vain.

Shapes: B sequences, T tokens, C places of a sequence, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lmssl.model.layers import at_places, layer_stacks

Pick = Callable[[Tensor], Tensor]
"""Hidden states [B, C, D] at the places, of [B, T, D]."""


def let_last_layer_choose(model: PreTrainedModel) -> None:
    """Let a body take `document_places` [B, C]: its last layer then returns [B, C, D]. Without, nothing changes.

    The layer's forward is wrapped in place: names of weights, and what a compiler or a sharding wrapper hangs on the
    layer, stay. A kind that is not known here is left alone.
    """
    tail = _TAILS.get(model.config.model_type)
    if tail is None or model.base_model is model:
        return
    for stack in layer_stacks(model.base_model):
        layer: Any = stack[-1]
        layer.forward = MethodType(_choosing(type(layer).forward, tail), layer)
        layer.reads_places = True


def chooses(model: PreTrainedModel) -> bool:
    """Whether its last layer takes places."""
    return all(getattr(stack[-1], "reads_places", False) for stack in layer_stacks(model.base_model))


def _choosing(forward: Callable[..., Any], tail: Callable[..., Tensor]) -> Callable[..., Any]:
    """A method, so that a copy of the layer has it with its own weights."""

    @wraps(forward)
    def run(layer: Any, *args: Any, document_places: Tensor | None = None, **kwargs: Any) -> Any:
        if document_places is None:
            return forward(layer, *args, **kwargs)
        return tail(layer, partial(at_places, places_BC=document_places), *args, **kwargs)

    return run


def _bert(
    layer: Any,
    pick: Pick,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,  # of decoders, which none of these is
    encoder_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    context = layer.attention.self(hidden_states, attention_mask=attention_mask, **kwargs)[0]
    attended = layer.attention.output(pick(context), pick(hidden_states))
    found: Tensor = layer.feed_forward_chunk(attended)
    return found


def _modernbert(layer: Any, pick: Pick, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    hidden = pick(hidden_states + layer.attn(layer.attn_norm(hidden_states), **kwargs)[0])
    found: Tensor = hidden + layer.mlp(layer.mlp_norm(hidden))
    return found


def _eurobert(layer: Any, pick: Pick, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
    hidden = pick(hidden_states + attended)
    found: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return found


def _distilbert(
    layer: Any, pick: Pick, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    attended = layer.attention(hidden_states, attention_mask=attention_mask, **kwargs)[0]
    hidden = layer.sa_layer_norm(pick(attended + hidden_states))
    found: Tensor = layer.output_layer_norm(layer.ffn(hidden) + hidden)
    return found


_TAILS: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _bert),
    "modernbert": _modernbert,
    "eurobert": _eurobert,
    "distilbert": _distilbert,
}
