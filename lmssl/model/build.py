"""Stock transformers models from a recipe: config, construction, initial weights."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lmssl.errors import ModelError
from lmssl.model.attention import document_attention, document_kwargs
from lmssl.model.head import IGNORE, output_weight, summed_cross_entropy
from lmssl.recipe.model import FAMILIES, ModelBase
from lmssl.tokenizer.load import Tokenizer

SIZE_FIELDS = (
    *("hidden_size", "n_embd", "d_model", "dim", "num_hidden_layers", "n_layer", "n_layers"),
    *("num_attention_heads", "n_head", "n_heads", "intermediate_size", "ffn_dim", "num_experts", "n_routed_experts"),
)
"""Fields that decide a model's size under the names transformers' families use; none may be left to its default."""


def build_config(
    model: ModelBase, *, vocab_size: int, sequence_length: int, tokenizer: Tokenizer | None
) -> PreTrainedConfig:
    """The transformers config of a `model` section.

    Args:
        vocab_size: rows of the embedding when the section does not say.
        sequence_length: tokens per sequence; the number of positions when the section does not say.
        tokenizer: gives bos, eos and pad ids and the least vocabulary; None in tests of shapes.
    Raises:
        ModelError: unknown kind or field, a size left out, a vocabulary or number of positions too small.
    """
    given = {name: value for name, value in model.model_dump().items() if name != "kind" and value is not None}
    kind = str(getattr(model, "kind", ""))
    known = config_fields(kind)
    _check_fields(kind, given, known)
    given["vocab_size"] = given.get("vocab_size", vocab_size)
    if tokenizer is not None and given["vocab_size"] < tokenizer.num_tokens:
        raise ModelError(
            f"the tokenizer has {tokenizer.num_tokens} tokens, the model's vocabulary only {given['vocab_size']}",
            where="model.vocab_size",
            remedy=f"remove model.vocab_size, or set it to at least {tokenizer.num_tokens}",
        )
    positions = next((name for name in ("max_position_embeddings", "n_positions") if name in known), None)
    if positions is not None and given.setdefault(positions, sequence_length) < sequence_length:
        raise ModelError(
            f"sequences of {sequence_length} tokens do not fit the model's {given[positions]} positions",
            where=f"model.{positions}",
            remedy=f"lower data.sequence_length to {given[positions]}, or raise model.{positions}",
        )
    if "rope_theta" in given and "rope_parameters" in known:
        given["rope_parameters"] = {"rope_type": "default", "rope_theta": given.pop("rope_theta")}
    if "head_dim" in known and "head_dim" not in given and "hidden_size" in given and "num_attention_heads" in given:
        given["head_dim"] = given["hidden_size"] // given["num_attention_heads"]
    if "num_key_value_heads" in known and "num_attention_heads" in given:
        given.setdefault("num_key_value_heads", given["num_attention_heads"])
    for name in ("bos", "eos", "pad"):
        given[f"{name}_token_id"] = getattr(tokenizer, f"{name}_id", None)
    config: PreTrainedConfig = CONFIG_MAPPING[kind](**given)
    return config


def config_fields(kind: str) -> dict[str, Any]:
    """Names and defaults of the fields that the config class of a `model_type` has.

    Raises:
        ModelError: transformers has no causal language model of this kind.
    """
    causal = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)  # names alone: the mapping of classes would import all of them
    if kind not in causal:
        near = difflib.get_close_matches(kind, causal, n=1)
        raise ModelError(
            f"transformers has no causal language model of kind {kind!r}",
            where="model.kind",
            remedy=f"did you mean {near[0]!r}?" if near else f"shipped families: {', '.join(FAMILIES)}",
        )
    cls = CONFIG_MAPPING[kind]
    if dataclasses.is_dataclass(cls):
        fields = {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(cls)}
    else:
        fields = {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self"}
    if "rope_parameters" in fields:
        fields["rope_theta"] = None
    return fields


def _check_fields(kind: str, given: dict[str, Any], known: dict[str, Any]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ModelError(
                f"{kind} has no field {name!r}",
                where=f"model.{name} = {given[name]!r}",
                remedy=f"did you mean {near[0]!r}?" if near else f"see transformers' config class of {kind}",
            )
    missing = [name for name in SIZE_FIELDS if isinstance(known.get(name), int) and name not in given]
    if missing:
        raise ModelError(
            f"{kind} needs {', '.join(missing)}: transformers' defaults are those of its largest model",
            where="model",
            remedy="give these fields a value",
        )


def build_model(config: PreTrainedConfig, *, seed: int, device: str = "cpu") -> PreTrainedModel:
    """A stock causal model with weights that depend on config and seed only, in float32.

    Args:
        seed: of the initial weights; the caller's random state is left alone.
        device: where weights are made; `meta` makes none. Weights are always drawn on CPU for equal results everywhere.
    """
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_attn_implementation("document")
    if str(config.model_type) not in FAMILIES and device != "meta":
        check_head(model)
    return model


def check_head(model: PreTrainedModel) -> None:
    """Prove on a few tokens that body, head and document attention give the stock loss.

    Some families scale or cap their logits or ignore the attention interface; training those through our head would
    optimise another model than the exported one.

    Raises:
        ModelError: the two losses differ.
    """
    model.eval()
    ids_BT = torch.arange(24).reshape(1, 24) % model.config.vocab_size
    with torch.no_grad():
        stock = float(model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss) * 23
        kwargs = document_kwargs(torch.ones_like(ids_BT), causal=True, documents=True)
        hidden = model.base_model(input_ids=ids_BT, use_cache=False, **kwargs).last_hidden_state[0]
        targets = torch.cat([ids_BT[0, 1:], torch.tensor([IGNORE])])
        ours = float(summed_cross_entropy(hidden, output_weight(model), targets, chunk_targets=24))
    if not abs(ours - stock) <= 1e-3 * max(1.0, abs(stock)):
        raise ModelError(
            f"{type(model).__name__} computes its loss otherwise than body and head: {ours:.4f} against {stock:.4f}",
            where="model.kind",
            remedy=f"use one of {', '.join(FAMILIES)}",
        )


def _no_mask(*_: Any, **__: Any) -> None:
    """What transformers' mask builder returns for our implementation: nothing."""
    return None


AttentionInterface.register("document", document_attention)
AttentionMaskInterface.register("document", _no_mask)
