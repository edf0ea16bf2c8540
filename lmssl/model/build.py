"""Stock transformers models from a recipe: config, construction, initial weights."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from contextlib import nullcontext
from typing import Any, cast

import torch
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    ElectraConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lmssl.errors import ModelError
from lmssl.model.attention import document_attention, document_kwargs
from lmssl.model.electra import ElectraPair
from lmssl.model.encoder import MASKED_KINDS, ROBERTA_KINDS, encode, masked_head
from lmssl.model.head import IGNORE, loss_and_correct, output_weight, summed_cross_entropy
from lmssl.model.last_layer import let_last_layer_choose
from lmssl.recipe.family import ModelBase
from lmssl.recipe.model import FAMILIES
from lmssl.recipe.objective import MaskedObjective, ReplacedObjective
from lmssl.recipe.sections import Recipe
from lmssl.tokenizer.load import Tokenizer

SIZE_FIELDS = (
    *("hidden_size", "n_embd", "d_model", "dim", "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "intermediate_size", "ffn_dim", "d_ff", "hidden_dim"),
    *("embedding_size", "num_experts", "n_routed_experts"),
)
"""Fields that decide a model's size under the names transformers' families use; none may be left to its default."""
_ACTIVATIONS = {"hidden_act", "hidden_activation", "activation_function", "activation"}
SPAN_KINDS = ("t5", "umt5", "mt5")
"""Kinds with an encoder and a decoder whose document attention is known here."""
UNDECLARED_FIELDS: dict[str, dict[str, Any]] = {
    "modernbert": {"global_attn_every_n_layers": 3, "global_rope_theta": None, "local_rope_theta": None},
    **{kind: {"tie_word_embeddings": True} for kind in SPAN_KINDS},
}
"""Fields that a kind's published configs have and its class reads without declaring them."""


def build_config(
    model: ModelBase,
    *,
    objective: str = "causal",
    vocab_size: int,
    sequence_length: int,
    tokenizer: Tokenizer | None,
) -> PreTrainedConfig:
    """The transformers config of a `model` section.

    Args:
        objective: kind of the recipe's objective; decides which kinds of model there are.
        vocab_size: rows of the embedding when the section does not say.
        sequence_length: tokens per sequence; the number of positions when the section does not say.
        tokenizer: gives ids of control tokens and the least vocabulary; None in tests of shapes.
    Raises:
        ModelError: unknown kind or field, a kind for another objective, a size left out, a vocabulary or number of
            positions too small, a control token that the kind needs and the tokenizer lacks.
    """
    kind = str(getattr(model, "kind", ""))
    check_kind(kind, objective)
    given = {name: value for name, value in model.model_dump().items() if name != "kind" and value is not None}
    known = config_fields(kind)
    _check_fields(kind, given, known)
    given["vocab_size"] = given.get("vocab_size", vocab_size)
    if tokenizer is not None and given["vocab_size"] < tokenizer.num_tokens:
        raise ModelError(
            f"the tokenizer has {tokenizer.num_tokens} tokens, the model's vocabulary only {given['vocab_size']}",
            where="model.vocab_size",
            remedy=f"remove model.vocab_size, or set it to at least {tokenizer.num_tokens}",
        )
    given |= _special_ids(kind, known, tokenizer)
    _set_positions(given, known, sequence_length + (given["pad_token_id"] + 1 if kind in ROBERTA_KINDS else 0))
    if "rope_theta" in given and "rope_parameters" in known:
        given["rope_parameters"] = {"rope_type": "default", "rope_theta": given.pop("rope_theta")}
    if "head_dim" in known and "head_dim" not in given and "hidden_size" in given and "num_attention_heads" in given:
        given["head_dim"] = given["hidden_size"] // given["num_attention_heads"]
    if "num_key_value_heads" in known and "num_attention_heads" in given:
        given.setdefault("num_key_value_heads", given["num_attention_heads"])
    if "d_kv" in known:
        given.setdefault("d_kv", given["d_model"] // given["num_heads"])
    if kind == "modernbert":
        _set_layers(given)
    config: PreTrainedConfig = CONFIG_MAPPING[kind](**given)
    return config


def check_kind(kind: str, objective: str, *, where: str = "model.kind") -> None:
    """See that there is a model of this kind for this kind of objective.

    Raises:
        ModelError: there is none.
    """
    # Names alone: the mappings of classes would import all of them.
    near: tuple[str, ...]
    others: set[str]
    causal = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*MASKED_KINDS}
    if objective == "span":
        near, needs = SPAN_KINDS, "an encoder with a decoder"
        others = {*causal, *MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    elif objective == "masked":
        near, needs, others = MASKED_KINDS, "a bidirectional encoder", {*causal, *SPAN_KINDS}
    elif objective == "replaced":
        near, needs, others = ("electra",), "a generator and a discriminator", {*causal, *SPAN_KINDS, *MASKED_KINDS}
    else:
        near, needs = tuple(sorted(causal)), "a decoder"
        others = {*MASKED_KINDS, *SPAN_KINDS}
    if kind in near:
        return
    if kind in ("deberta", "deberta-v2") and objective in ("masked", "replaced"):
        raise ModelError(
            f"{kind} cannot pack documents under its attention",
            where=where,
            remedy="use modernbert or bert" if objective == "masked" else "use electra",
        )
    if kind in others:
        raise ModelError(
            f"the objective {objective} needs {needs}, and {kind} is none",
            where=where,
            remedy=_other_objective(kind, objective),
        )
    if objective in ("masked", "replaced") and kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ModelError(
            f"the body and head of {kind} are not known here",
            where=where,
            remedy=f"use one of {', '.join(near)}",
        )
    guess = difflib.get_close_matches(kind, near, n=1)
    shipped = [name for name in FAMILIES if name in near]
    raise ModelError(
        f"transformers has no model of kind {kind!r} that is {needs}",
        where=where,
        remedy=f"did you mean {guess[0]!r}?" if guess else f"shipped families: {', '.join(shipped)}",
    )


def _other_objective(kind: str, objective: str) -> str:
    """What to change when a kind is for another objective."""
    if objective == "masked":
        use = "bert, roberta, modernbert, electra, eurobert or distilbert"
    else:
        use = {"replaced": "electra", "span": "t5, umt5 or mt5"}.get(objective, "llama, qwen3 or gpt2")
    own = "masked" if kind in MASKED_KINDS else "span" if kind in SPAN_KINDS else "causal"
    if own == "causal" and objective == "masked":
        own = "hybrid"  # masked tokens for a decoder
    return f"use {use}, or objective.kind: {own}"


def _special_ids(kind: str, known: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Ids of control tokens for every field the class has; its own defaults belong to published tokenizers.

    Raises:
        ModelError: the kind cannot do without a token that the tokenizer lacks.
    """
    ids = {role: getattr(tokenizer, f"{role}_id", None) for role in ("bos", "eos", "pad", "cls", "sep", "mask")}
    needed = {"eurobert": "mask"} | dict.fromkeys((*ROBERTA_KINDS, *SPAN_KINDS), "pad")
    role = needed.get(kind)
    if role is not None and ids[role] is None:
        if tokenizer is not None:
            raise ModelError(
                f"{kind} needs a {role} token, and the tokenizer has none",
                where="tokenizer.path",
                remedy=f"train the tokenizer with a {role} token, or name it in tokenizer_config.json",
            )
        ids[role] = 0
    always = ("bos", "eos", "pad")  # fields of every class
    given = {f"{role}_token_id": ids[role] for role in ids if role in always or f"{role}_token_id" in known}
    return given | ({"decoder_start_token_id": ids["pad"]} if kind in SPAN_KINDS else {})


def _set_positions(given: dict[str, Any], known: dict[str, Any], needed: int) -> None:
    name = next((name for name in ("max_position_embeddings", "n_positions") if name in known), None)
    if name is not None and given.setdefault(name, needed) < needed:
        raise ModelError(
            f"sequences of {needed} tokens do not fit the model's {given[name]} positions",
            where=f"model.{name}",
            remedy=f"lower data.sequence_length by {needed - given[name]}, or raise model.{name}",
        )


def _set_layers(given: dict[str, Any]) -> None:
    """ModernBERT's layers and rotations in the form that its config class stores."""
    every, thetas = given.pop("global_attn_every_n_layers", 3), {}
    for layers, name, default in (("full", "global", 160_000.0), ("sliding", "local", 10_000.0)):
        theta = given.pop(f"{name}_rope_theta", default)
        thetas[f"{layers}_attention"] = {"rope_type": "default", "rope_theta": theta}
    given.setdefault("rope_parameters", thetas)
    number = given["num_hidden_layers"]
    given.setdefault("layer_types", ["sliding_attention" if i % every else "full_attention" for i in range(number)])


def config_fields(kind: str) -> dict[str, Any]:
    """Names and defaults of the fields that the config class of a `model_type` has."""
    cls = CONFIG_MAPPING[kind]
    if dataclasses.is_dataclass(cls):
        fields = {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(cls)}
    else:
        fields = {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self"}
    if "rope_parameters" in fields:
        fields["rope_theta"] = None
    return fields | UNDECLARED_FIELDS.get(kind, {})


def _check_fields(kind: str, given: dict[str, Any], known: dict[str, Any]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ModelError(
                f"{kind} has no field {name!r}",
                where=f"model.{name} = {given[name]!r}",
                remedy=f"did you mean {near[0]!r}?" if near else f"see transformers' config class of {kind}",
            )
    for name in _ACTIVATIONS & given.keys():
        if isinstance(given[name], str) and given[name] not in ACT2FN:
            near = difflib.get_close_matches(given[name], ACT2FN, n=1)
            raise ModelError(
                f"transformers has no activation {given[name]!r}",
                where=f"model.{name}",
                remedy=f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(sorted(ACT2FN))}",
            )
    missing = [name for name in SIZE_FIELDS if isinstance(known.get(name), int) and name not in given]
    if missing:
        raise ModelError(
            f"{kind} needs {', '.join(missing)}: transformers' defaults are those of its largest model",
            where="model",
            remedy="give these fields a value",
        )


def build_recipe_model(
    recipe: Recipe, config: PreTrainedConfig, *, device: str = "cpu", draw: bool = True
) -> PreTrainedModel:
    """The model that a recipe trains, as `build_model` makes it from the recipe's config."""
    section = recipe.objective
    ratio = section.generator_ratio if isinstance(section, ReplacedObjective) else 1.0
    sentences = isinstance(section, MaskedObjective) and section.sentence_task is not None
    return build_model(
        config,
        objective=section.kind,
        seed=recipe.seed,
        device=device,
        generator_ratio=ratio,
        sentences=sentences,
        draw=draw,
    )


def build_model(
    config: PreTrainedConfig,
    *,
    objective: str = "causal",
    seed: int,
    device: str = "cpu",
    generator_ratio: float = 0.25,
    sentences: bool = False,
    draw: bool = True,
) -> PreTrainedModel:
    """A stock model with weights that depend on config and seed only, in float32.

    Args:
        objective: kind of the recipe's objective; decides the class.
        generator_ratio: for `replaced`, width of the generator's layers / the model's.
        sentences: for `masked`, the class that also judges pairs of sentences.
        seed: of the initial weights; the caller's random state is left alone.
        device: where weights are made; `meta` makes none. Weights are always drawn on CPU for equal results everywhere.
        draw: whether there must be initial weights; without, they may be what memory holds, until others are loaded.
    Raises:
        ModelError: a family that is not shipped computes its loss otherwise than body and head.
    """
    draw = draw or config.model_type not in FAMILIES  # whose buffers might be made with the weights
    auto = {"masked": AutoModelForMaskedLM, "span": AutoModelForSeq2SeqLM}.get(objective, AutoModelForCausalLM)
    model: PreTrainedModel
    with torch.random.fork_rng(devices=[]), torch.device(device), nullcontext() if draw else no_init_weights():
        torch.manual_seed(seed)
        if objective == "replaced":
            model = ElectraPair(cast(ElectraConfig, config), generator_ratio)
        else:
            model = (AutoModelForPreTraining if sentences else auto).from_config(config, dtype=torch.float32)
    if not draw:
        model.tie_weights()
    for part in model.modules():  # transformers 5.17 forgets the stacks of T5
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation("document")
    if objective in ("masked", "replaced"):
        let_last_layer_choose(model.generator if isinstance(model, ElectraPair) else model)
    if str(config.model_type) not in FAMILIES and device != "meta":
        (check_masked_head if objective == "masked" else check_head)(model)
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
    _check_equal(model, ours, stock)


def check_masked_head(model: PreTrainedModel) -> None:
    """`check_head` for bidirectional models; leaves the model in evaluation mode, too.

    Raises:
        ModelError: the two losses differ.
    """
    model.eval()
    # Control tokens stand first in most vocabularies, and some models treat padding apart.
    ids_BT = model.config.vocab_size - 1 - torch.arange(24).reshape(1, 24) % (model.config.vocab_size // 2)
    with torch.no_grad():
        stock = float(model(input_ids=ids_BT, labels=ids_BT).loss) * 24
        head = masked_head(model)
        hidden = encode(model, ids_BT, torch.ones_like(ids_BT), torch.arange(24)[None])[0]
        parts = (head.transform(hidden), head.weight_VD, head.bias_V)
        ours = float(loss_and_correct(*parts, ids_BT[0], chunk_targets=24)[0])
    _check_equal(model, ours, stock)


def _check_equal(model: PreTrainedModel, ours: float, stock: float) -> None:
    if not abs(ours - stock) <= 1e-3 * max(1.0, abs(stock)):
        raise ModelError(
            f"{type(model).__name__} computes its loss otherwise than body and head: {ours:.4f} against {stock:.4f}",
            where="model.kind",
            remedy=f"use one of {', '.join(FAMILIES)}",
        )


# Without a mask function beside it: transformers then makes none, and does not ask the device for packed sequences.
AttentionInterface.register("document", document_attention)
