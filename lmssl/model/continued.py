"""Models that exist, taken up: their config with what the recipe changes, their weights, rows for new tokens.

Source: a new token's row is the mean of the rows of what the older tokenizer made of its text (Gee et al. 2022, "Fast
Vocabulary Transfer"), or the mean of all rows, with which the loss on old text grows by at most the share of new rows
(Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"); differs from the latter in drawing no
noise around the mean, as the first batches tell new tokens apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from lmssl.errors import ModelError
from lmssl.model.build import SPAN_KINDS, build_config, check_kind
from lmssl.model.electra import ElectraPair, generator_config
from lmssl.model.encoder import ROBERTA_KINDS
from lmssl.model.source import Source, newest_step, open_source
from lmssl.recipe.family import ContinuedModel
from lmssl.recipe.objective import MaskedObjective, ReplacedObjective
from lmssl.recipe.sections import Recipe
from lmssl.tokenizer.extension import NewToken, new_tokens
from lmssl.tokenizer.load import Tokenizer

Report = Callable[[str], None]
Choose = Callable[[Path], Path]

_NO_DROPOUT = ("classifier", "layerdrop", "summary", "cls_dropout", "head")
"""Parts of names of dropout fields that pretraining does not use."""


def recipe_config(
    recipe: Recipe, tokenizer: Tokenizer, *, saved: str | None = None, choose: Choose = newest_step
) -> PreTrainedConfig:
    """The transformers config of the model that a recipe trains, built or continued.

    Args:
        saved: config.json of a checkpoint of the run, which needs no longer what a continued model came from.
        choose: as in `open_source`.
    Raises:
        ModelError: as `build_config` and `open_source`; a model for another objective, too few positions, an override
            that its config has no field for.
        TokenizerError: the recipe's tokenizer does not extend the model's.
    """
    section, length = recipe.model, recipe.data.longest_sequence
    if not isinstance(section, ContinuedModel):
        return build_config(
            section,
            objective=recipe.objective.kind,
            vocab_size=recipe.vocab_size(tokenizer.num_tokens),
            sequence_length=length,
            tokenizer=tokenizer,
        )
    if saved is not None:
        config: PreTrainedConfig = AutoConfig.for_model(**json.loads(saved))
        return config
    source = open_source(section, choose=choose)
    check_kind(source.kind, recipe.objective.kind, where=f"model.from = {source.name}")
    config = CONFIG_MAPPING[source.kind].from_dict(source.config)
    _check_tokenizer(source, config, tokenizer)
    config.vocab_size = _vocab_size(recipe, section, config.vocab_size, tokenizer.num_tokens)
    _set_control_tokens(config, tokenizer)
    _set_positions(section, config, length)
    _set_dropout(section, config)
    if section.rope_theta is not None:
        _set_rope(config, section.rope_theta)
    return config


def begin(
    model: PreTrainedModel, recipe: Recipe, tokenizer: Tokenizer, report: Report, *, choose: Choose = newest_step
) -> str | None:
    """Give a fresh model the weights that its recipe continues from, before any backend exists.

    Args:
        model: built from `recipe_config`; a recipe that builds its model leaves it as it was drawn.
    Returns:
        what was taken, with the commit on the Hub; None: nothing.
    Raises:
        ModelError: the weights are of another class than the objective's, or of other shapes.
    """
    section = recipe.model
    if not isinstance(section, ContinuedModel):
        return None
    source = open_source(section, choose=choose)
    weights = _step_weights(source) if source.of_run else _folder_weights(source, model, recipe)
    old = source.tokenizer()
    added = [] if old is None else new_tokens(old, tokenizer)
    _copy(model, weights, added, section.new_tokens, num_tokens=None if old is None else old.num_tokens, source=source)
    taken = f"{source.path}" if source.commit is None else f"{source.name} at commit {source.commit}"
    report(f"continuing the model of {taken}")
    if added:
        shown = ", ".join(repr(token.text) for token in added[:5]) + (", ..." if len(added) > 5 else "")
        report(f"{len(added):,} tokens are new to the model: {shown}; the vocabulary has {model.config.vocab_size:,}")
    if old is None:
        report("the model's folder has no tokenizer.json, so nobody can see whether the tokenizer is the model's")
    return taken


def _check_tokenizer(source: Source, config: PreTrainedConfig, tokenizer: Tokenizer) -> None:
    old = source.tokenizer()
    if old is not None:
        new_tokens(old, tokenizer)
    elif tokenizer.num_tokens > config.vocab_size:
        raise ModelError(
            f"the tokenizer has {tokenizer.num_tokens} tokens, the model {config.vocab_size} rows, and without the "
            "model's own tokenizer nobody can tell which are new",
            where=str(source.path),
            remedy="put the model's tokenizer.json beside its config.json",
        )
    if source.kind in ROBERTA_KINDS and tokenizer.pad_id != config.pad_token_id:
        raise ModelError(
            f"{source.kind} counts positions from its pad token, {config.pad_token_id}, and the tokenizer's is "
            f"{tokenizer.pad_id}",
            where="tokenizer.path",
            remedy="use the model's own pad token",
        )


def _vocab_size(recipe: Recipe, section: ContinuedModel, rows: int, num_tokens: int) -> int:
    """Rows of the embedding: the model's own unless there are more tokens; never fewer."""
    needed = max(rows, num_tokens)
    if section.vocab_size is not None:
        if section.vocab_size < needed:
            raise ModelError(
                f"the model has {rows} rows and the tokenizer {num_tokens} tokens, more than {section.vocab_size}",
                where="model.vocab_size",
                remedy=f"leave it out, or set it to at least {needed}",
            )
        return section.vocab_size
    multiple = recipe.tokenizer.pad_to_multiple
    return rows if needed == rows else -(-needed // multiple) * multiple


def _set_control_tokens(config: PreTrainedConfig, tokenizer: Tokenizer) -> None:
    for role in ("bos", "eos", "pad", "cls", "sep", "mask"):
        number, name = getattr(tokenizer, f"{role}_id"), f"{role}_token_id"
        if number is not None and (hasattr(config, name) or role in ("bos", "eos", "pad")):
            setattr(config, name, number)


def _set_positions(section: ContinuedModel, config: PreTrainedConfig, length: int) -> None:
    """Rotary and relative positions go on as far as wanted; a learned table ends where it ends."""
    name = next((n for n in ("max_position_embeddings", "n_positions") if hasattr(config, n)), None)
    if name is None or config.model_type in SPAN_KINDS:
        return
    own, learned = int(getattr(config, name)), getattr(config, "rope_parameters", None) is None
    before = int(config.pad_token_id) + 1 if config.model_type in ROBERTA_KINDS else 0
    wanted = section.max_position_embeddings or (own if learned else max(own, length))
    if learned and wanted != own:
        raise ModelError(
            f"the model has learned {own} positions, which cannot become {wanted}",
            where="model.max_position_embeddings",
            remedy="leave it out",
        )
    if wanted - before < length:
        raise ModelError(
            f"sequences of {length} tokens do not fit the model's {wanted - before} positions",
            where="data.sequence_length" if learned else "model.max_position_embeddings",
            remedy=f"lower data.sequence_length to {wanted - before}" if learned else "leave it out, or raise it",
        )
    setattr(config, name, wanted)


def _set_dropout(section: ContinuedModel, config: PreTrainedConfig) -> None:
    if section.dropout is None:
        return
    names = [n for n in config.to_dict() if ("drop" in n or n.endswith("_pdrop")) and not _unused(n)]
    if not names:
        raise ModelError(f"{config.model_type} has no dropout", where="model.dropout", remedy="leave model.dropout out")
    for name in names:
        setattr(config, name, section.dropout)


def _unused(name: str) -> bool:
    return any(part in name for part in _NO_DROPOUT)


def _set_rope(config: PreTrainedConfig, theta: float) -> None:
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise ModelError(
            f"{config.model_type} has no rotary positions", where="model.rope_theta", remedy="leave it out"
        )
    parameters.get("full_attention", parameters)["rope_theta"] = theta


def _step_weights(source: Source) -> dict[str, Tensor]:
    """Named weights of a checkpoint of ours, in however many files they are."""
    found: dict[str, Tensor] = {}
    for file in sorted(source.path.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    return found


def _folder_weights(source: Source, model: PreTrainedModel, recipe: Recipe) -> dict[str, Tensor]:
    """Named weights of a transformers folder, as the stock class of the objective names them."""
    section = recipe.objective
    auto: Any = {"masked": AutoModelForMaskedLM, "span": AutoModelForSeq2SeqLM}.get(section.kind, AutoModelForCausalLM)
    if isinstance(section, MaskedObjective) and section.sentence_task is not None:
        auto = AutoModelForPreTraining
    if not isinstance(section, ReplacedObjective):
        return dict(_load(auto, source.path, source.kind, recipe).named_parameters())
    pair, folder = cast(ElectraPair, model), source.path / "generator"
    if not folder.is_dir():
        raise ModelError(
            "the folder has a discriminator and no generator",
            where=str(folder),
            remedy="put the generator's files into a folder `generator` inside it, as `lmssl export` does",
        )
    parts = {
        "discriminator": _load(AutoModelForPreTraining, source.path, "electra", recipe),
        "generator": _load(AutoModelForMaskedLM, folder, "electra", recipe),
    }
    theirs, ours = parts["generator"].config, generator_config(pair.discriminator.config, section.generator_ratio)
    if theirs.hidden_size != ours.hidden_size or theirs.num_hidden_layers != ours.num_hidden_layers:
        raise ModelError(
            f"the generator is {theirs.hidden_size} wide with {theirs.num_hidden_layers} layers, "
            f"objective.generator_ratio makes one of {ours.hidden_size} with {ours.num_hidden_layers}",
            where="objective.generator_ratio",
            remedy="use the ratio that the pair was trained with",
        )
    named = {f"{part}.{name}": p for part, stock in parts.items() for name, p in stock.named_parameters()}
    kept = dict(model.named_parameters())  # the pair has one module for the embeddings of both
    return {name: tensor for name, tensor in named.items() if name in kept or not _shared(name)}


def _shared(name: str) -> bool:
    return name.startswith("generator.electra.embeddings.") or name == "generator.generator_lm_head.weight"


def _load(auto: Any, folder: Path, kind: str, recipe: Recipe) -> PreTrainedModel:
    """A stock model with every weight from the folder's safetensors."""
    disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            loaded, about = auto.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"the weights cannot be read: {str(error).strip().splitlines()[0]}",
            where=str(folder),
            remedy="check the files, or write them again with save_pretrained",
        ) from error
    lacking = sorted(about["missing_keys"]) + sorted(str(key) for key in about["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"{lacking[0]!r} and {len(lacking) - 1} more weights of {type(loaded).__name__} are not in the folder: it "
            f"holds another class of {kind}",
            where=str(folder),
            remedy=f"the objective {recipe.objective.kind} needs the head of {type(loaded).__name__} as well",
        )
    model: PreTrainedModel = loaded
    return model


def _copy(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    added: Sequence[NewToken],
    how: str,
    *,
    num_tokens: int | None,
    source: Source,
) -> None:
    """Every weight by its name; those with a row a token get rows for the tokens that are new."""
    named = dict(model.named_parameters())
    by_token = _by_token(model)
    wrong = sorted(set(named) ^ set(weights))
    for name in named.keys() & weights.keys():
        cut = 1 if name in by_token else 0
        if named[name].shape[cut:] != weights[name].shape[cut:] or (cut and len(named[name]) < len(weights[name])):
            wrong.append(name)
    if wrong:
        raise ModelError(
            f"the weights are not those of {type(model).__name__}: {wrong[0]!r} and {len(wrong) - 1} more differ in "
            "name or shape",
            where=str(source.path),
            remedy="continue it with the objective and the kind of model that it was trained with",
        )
    with torch.no_grad():
        for name, parameter in named.items():
            old = weights[name].detach().float()
            parameter.copy_(with_new_rows(old, len(parameter), added, how, num_tokens) if name in by_token else old)


def with_new_rows(old: Tensor, num_rows: int, added: Sequence[NewToken], how: str, num_tokens: int | None) -> Tensor:
    """A matrix or bias with a row a token, [V, D] or [V], for more tokens.

    Args:
        how: `parts` or `mean`; a token without parts gets the mean.
        num_tokens: whose rows are trained; what follows pads. None: all.

    >>> old = torch.tensor([1.0, 2.0, 6.0, 0.0])
    >>> with_new_rows(old, 6, [NewToken(3, "ab", (0, 1)), NewToken(4, "<x>", ())], "parts", 3).tolist()
    [1.0, 2.0, 6.0, 1.5, 3.0, 3.0]
    """
    mean = old[:num_tokens].mean(0)
    found = torch.cat([old, mean.expand(num_rows - len(old), *mean.shape)])
    for token in added:
        found[token.id] = old[list(token.parts)].mean(0) if token.parts and how == "parts" else mean
    return found


def _by_token(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that have a row a token: embeddings, heads and their biases."""
    found: set[int] = set()
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or isinstance(part, ElectraPair):
            continue
        for module in (part.get_input_embeddings(), part.get_output_embeddings()):
            found |= {id(parameter) for parameter in (module.parameters() if module is not None else ())}
    return {name for name, parameter in model.named_parameters() if id(parameter) in found}
