"""Pieces of stock layers for training steps on CPU: the same functions in fewer passes over memory.

Biases are added after products, where a kernel or torch's compiler takes them with what follows; torch would copy them
over the output first. Attention, activations, norms and gradients of weights and embeddings run in kernels of our own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation, SiLUActivation

from lmssl.model.kernels import joined_attention
from lmssl.model.linear import linear
from lmssl.model.native import applies
from lmssl.model.pointwise import embedding_gradient, gelu, residual_norm, rms_norm, swiglu


def fuse_layers(module: nn.Module) -> None:
    """Wrap forwards in place; where kernels do not apply they stay as they are, and so do names of weights."""
    part: Any
    for part in module.modules():
        if type(part) is nn.Linear:
            _where_applied(part, _linear)
        elif type(part) is nn.Embedding and part.max_norm is None and not (part.sparse or part.scale_grad_by_freq):
            _where_applied(part, _looked_up)
        elif type(part).__name__ in _ATTENTIONS:
            _attend_joined(part, _ATTENTIONS[type(part).__name__])
        elif type(part).__name__ in _RESIDUAL and part.dense.out_features % 16 == 0:
            _where_applied(part, _residual)
        elif type(part).__name__ in _TRANSFORMS and type(_activation(part)) is GELUActivation:
            _where_applied(part, _transform)
        elif hasattr(part, "intermediate_act_fn") and type(part.intermediate_act_fn) is GELUActivation:
            _where_applied(part, _intermediate)
        elif type(part).__name__ in _GATED and isinstance(part.act_fn, nn.SiLU | SiLUActivation):
            _where_applied(part, _gated)
        elif type(part).__name__ in _DECODERS and not getattr(part, "reads_places", False):
            _around_norms(part)


_GATED = ("LlamaMLP", "Qwen3MLP", "EuroBertMLP")
"""Classes whose forward is `down(act(gate(x)) * up(x))`."""


_DECODERS = ("LlamaDecoderLayer", "Qwen3DecoderLayer", "EuroBertDecoderLayer")
"""Classes whose forward is `h + mlp(norm(h))` of `h = hidden + attention(norm(hidden))`, norms by root mean squares."""


_FAMILY = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")
_RESIDUAL = (*(f"{kind}SelfOutput" for kind in _FAMILY), *(f"{kind}Output" for kind in _FAMILY))
"""Classes whose forward is `LayerNorm(dropout(dense(hidden)) + around)`."""
_TRANSFORMS = ("BertPredictionHeadTransform", "ElectraGeneratorPredictions")
"""Classes whose forward is `LayerNorm(gelu(dense(hidden)))`."""
_ROTARY, _BERT = ("q_proj", "k_proj", "v_proj"), ("query", "key", "value")
_ATTENTIONS = {
    **dict.fromkeys(("LlamaAttention", "EuroBertAttention"), _ROTARY),
    **{f"{kind}SelfAttention": _BERT for kind in _FAMILY},
}
"""Classes of attention without anything between their products, rotary positions and scores."""


def _where_applied(part: Any, fused: Callable[..., Tensor]) -> None:
    """A method, so that a copy of the part has it with its own weights."""
    forward = type(part).forward

    @wraps(forward)
    def run(part: Any, *tensors: Tensor) -> Tensor:
        if applies():
            return fused(part, *tensors)
        found: Tensor = forward(part, *tensors)
        return found

    part.forward = MethodType(run, part)


def _linear(part: nn.Linear, hidden: Tensor) -> Tensor:
    product = linear(hidden, part.weight)
    return product if part.bias is None else product + part.bias.to(product.dtype)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, ids: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocabulary, ctx.padding = weight_VD.shape[0], padding
        return F.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return embedding_gradient(grads[0].flatten(0, -2), ids.flatten(), ctx.vocabulary, ctx.padding), None, None


def _looked_up(part: nn.Embedding, ids: Tensor) -> Tensor:
    padding = -1 if part.padding_idx is None else part.padding_idx
    found: Tensor = _LookUp.apply(part.weight, ids, padding)  # type: ignore[no-untyped-call]
    return found


def _attend_joined(part: Any, names: tuple[str, str, str]) -> None:
    """Let attention make queries, keys and values as one product, which the kernel rotates as it reads it."""
    forward = type(part).forward

    @wraps(forward)
    def run(part: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (applies() and _fits(part, args, kwargs)):
            return forward(part, hidden_states, *args, **kwargs)
        three = [getattr(part, name) for name in names]
        product = linear(hidden_states, *(one.weight for one in three))
        bias = None if three[0].bias is None else torch.cat([one.bias for one in three])
        cos, sin = kwargs.get("position_embeddings") or (None, None)
        width, causal = _head_width(part), bool(kwargs["document_causal"])
        heads = three[0].out_features // width
        context, _lse = joined_attention(
            product, bias, heads, width, cos, sin, kwargs["document_segments"], causal, part.scaling
        )
        return part.o_proj(context) if names == _ROTARY else context, None

    part.forward = MethodType(run, part)


def _around_norms(part: Any) -> None:
    """Add what attention found and normalise the sum in one pass, with one pass back for what goes around as well."""
    forward = type(part).forward

    @wraps(forward)
    def run(part: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        first, second = part.input_layernorm, part.post_attention_layernorm
        fits = hidden_states.dtype == torch.float32 and hidden_states.shape[-1] % 16 == 0 and not args
        if not (fits and applies()):
            return forward(part, hidden_states, *args, **kwargs)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        around, normed = rms_norm(None, hidden_states, first.weight, first.variance_epsilon, dtype)
        attended = part.self_attn(hidden_states=normed, **kwargs)[0]
        around, normed = rms_norm(attended, around, second.weight, second.variance_epsilon, dtype)
        return around + part.mlp(normed)

    part.forward = MethodType(run, part)


def _head_width(part: Any) -> int:
    width: int = part.head_dim if hasattr(part, "head_dim") else part.attention_head_size
    return width


def _fits(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is one of training that the kernel knows: by documents, or causal over whole sequences."""
    dropout = part.dropout.p if hasattr(part, "dropout") else part.attention_dropout
    by_documents = kwargs.get("document_segments") is not None or (
        kwargs.get("document_mask") is None and bool(kwargs.get("document_causal"))
    )
    ours = part.config._attn_implementation == "document"
    plain = ours and kwargs.get("past_key_values") is None and kwargs.get("attention_mask") is None and not args
    return by_documents and plain and not (dropout and part.training) and _head_width(part) % 32 == 0


def _intermediate(part: Any, hidden: Tensor) -> Tensor:
    """Of BERT's family."""
    found: Tensor = gelu(linear(hidden, part.dense.weight), part.dense.bias)
    return found


def _activation(part: Any) -> Any:
    return part.transform_act_fn if hasattr(part, "transform_act_fn") else part.activation


def _transform(part: Any, hidden: Tensor) -> Tensor:
    """What comes before the output embedding; torch's compiler would take the error function once for every sum."""
    found: Tensor = part.LayerNorm(gelu(linear(hidden, part.dense.weight), part.dense.bias))
    return found


def _residual(part: Any, hidden: Tensor, around: Tensor) -> Tensor:
    """The end of attention and of a layer, of BERT's family."""
    product = linear(hidden, part.dense.weight)
    norm = part.LayerNorm
    if part.training and part.dropout.p:
        found: Tensor = norm(part.dropout(product + part.dense.bias.to(product.dtype)) + around)
    else:
        found = residual_norm(product, part.dense.bias, around.float(), norm.weight, norm.bias, norm.eps)[0]
    return found


def _gated(part: Any, hidden: Tensor) -> Tensor:
    product = linear(hidden, part.gate_proj.weight, part.up_proj.weight)
    if part.gate_proj.bias is not None:
        product = product + torch.cat([part.gate_proj.bias, part.up_proj.bias]).to(product.dtype)
    found: Tensor = part.down_proj(swiglu(product))
    return found
