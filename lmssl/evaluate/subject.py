"""What is evaluated: a transformers folder, or a checkpoint of a run, opened and understood."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

import lmssl.model.build  # noqa: F401  registers document attention
from lmssl import checkpoint
from lmssl.errors import CheckpointError, EvaluationError
from lmssl.evaluate.reader import Reader
from lmssl.evaluate.suite import LIKELIHOODS
from lmssl.model.build import SPAN_KINDS, build_recipe_model
from lmssl.model.electra import ElectraPair
from lmssl.model.encoder import MASKED_KINDS, ROBERTA_KINDS
from lmssl.recipe.load import load_recipe
from lmssl.recipe.model import FAMILIES
from lmssl.recipe.sections import Recipe
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

Kind = Literal["causal", "masked", "span"]
_AUTO = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "span": AutoModelForSeq2SeqLM}
_NO_MODEL = "give a folder written by save_pretrained or `lmssl export`, or a run folder with checkpoints"


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with its tokenizer."""

    path: Path
    model: PreTrainedModel
    """In evaluation mode, in float32 on CPU."""
    kind: Kind | None
    """What it does with text; None: it neither writes nor fills."""
    tokenizer: Tokenizer
    recipe: Recipe | None
    """Of a run."""
    step: int | None
    """Of a run."""

    @property
    def what(self) -> str:
        """What a person calls it."""
        return f"this {self.model.config.model_type}"

    @property
    def reader(self) -> Reader:
        """How it reads texts."""
        return Reader(
            self.tokenizer,
            None if self.kind == "span" else self.kind,
            longest_tokens=longest_text(self.model.config),
            begins_with_bos=self.recipe is not None and self.recipe.data.bos,
            what=self.what,
        )

    def with_stock_attention(self) -> Subject:
        """The same with transformers' own attention, for its own loops of generation."""
        if self.model.config._attn_implementation == "document":
            _set_attention(self.model, "eager" if self.kind == "span" else "sdpa")
        return self


def open_subject(path: Path, *, step: int | None = None, ema: bool = False) -> Subject:
    """Open a transformers folder, or a checkpoint of a run.

    Args:
        step: of a run's checkpoint; None is the newest.
        ema: of a run, the moving average that `train.ema_decay` kept, instead of the weights.
    Raises:
        CheckpointError: the run has no such checkpoint, or kept no average.
        EvaluationError: the folder holds neither, or a model that cannot be loaded.
        TokenizerError: its tokenizer cannot be loaded.
    """
    if not path.is_dir():
        raise EvaluationError("there is no such folder", where=str(path), remedy=_NO_MODEL)
    if (path / "manifest.json").exists():
        number = path.name.removeprefix("step-").lstrip("0")
        raise EvaluationError(
            "this is a checkpoint, which only its run can open",
            where=str(path),
            remedy=f"give the run and the step: {path.parent.parent} --step {number or 0}",
        )
    if checkpoint.checkpoints_path(path).is_dir():
        return _open_run(path, step, ema=ema)
    if not (path / "config.json").is_file():
        raise EvaluationError("the folder holds no model: there is no config.json", where=str(path), remedy=_NO_MODEL)
    if step is not None:
        raise EvaluationError(
            "a transformers folder has no steps", where=f"--step {step}", remedy="give a run folder, or leave it out"
        )
    if ema:
        raise EvaluationError(
            "a transformers folder has one set of weights", where="--ema", remedy="give a run folder, or leave it out"
        )
    return _open_folder(path)


def longest_text(config: PreTrainedConfig) -> int | None:
    """Tokens that a model reads at most, special ones included; None: no limit."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if config.model_type in SPAN_KINDS:
        return None
    if config.model_type in ROBERTA_KINDS and positions is not None:
        return positions - int(config.pad_token_id) - 1  # its positions begin behind that of padding
    return positions or getattr(config, "n_positions", None)


def recipe_reader(recipe: Recipe, config: PreTrainedConfig, tokenizer: Tokenizer) -> Reader:
    """How the model that a recipe trains reads texts."""
    return Reader(
        tokenizer,
        LIKELIHOODS.get(recipe.objective.kind),
        longest_tokens=longest_text(config),
        begins_with_bos=recipe.data.bos,
        what=f"this {config.model_type}",
    )


def _open_run(path: Path, step: int | None, *, ema: bool) -> Subject:
    found = checkpoint.find_step(path, step)
    recipe = load_recipe(found.path / "recipe.yaml").recipe
    if ema and recipe.train.ema_decay is None:
        raise CheckpointError(
            "the run kept no moving average of its weights",
            where=str(found.path),
            remedy="leave out --ema; train.ema_decay=0.999 keeps one in a new run",
        )
    config = AutoConfig.for_model(**json.loads(found.text("config.json")))
    model = build_recipe_model(recipe, config)
    checkpoint.load_weights(model, found.tensors("ema" if ema else "model"), where=str(found.path))
    kind: Kind | None = "span" if recipe.objective.kind == "span" else LIKELIHOODS.get(recipe.objective.kind)
    if isinstance(model, ElectraPair):
        model, kind = model.generator, "masked"  # the part that knows how likely a token is
    return Subject(path, model.eval(), kind, load_tokenizer(path / "tokenizer"), recipe, found.step)


def _open_folder(path: Path) -> Subject:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        kind = _kind(config)
        auto: Any = _AUTO[kind or "masked"]
        model, info = auto.from_pretrained(path, local_files_only=True, dtype=torch.float32, output_loading_info=True)
        tokenizer = _folder_tokenizer(path)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        remedy = "write the folder again"
        if (path / "generator" / "config.json").is_file():
            remedy = f"give the generator, which knows words: {path / 'generator'}"
        raise EvaluationError(f"the model cannot be loaded: {reason}", where=str(path), remedy=remedy) from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])})
    if missing:
        raise EvaluationError(
            f"the folder has no weights for {missing[0]!r} and {len(missing) - 1} more of {type(model).__name__}",
            where=str(path),
            remedy="evaluate the pretrained model with its language-modelling head",
        )
    if config.model_type in FAMILIES and kind != "span":
        _set_attention(model, "document")
    return Subject(path, model.eval(), kind, tokenizer, None, None)


def _kind(config: PreTrainedConfig) -> Kind | None:
    """What the class that a config names does.

    Raises:
        ValueError: its class is known to do nothing with text.
    """
    named = (getattr(config, "architectures", None) or [""])[0]
    if config.is_encoder_decoder:
        return "span"
    if named.endswith("ForMaskedLM") or named == "BertForPreTraining":
        return "masked"
    if named.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if named:
        raise ValueError(f"{named} has no language-modelling head")
    return "masked" if config.model_type in MASKED_KINDS else "causal"


def _set_attention(model: PreTrainedModel, name: str) -> None:
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation(name)


def _folder_tokenizer(path: Path) -> Tokenizer:
    """The folder's tokenizer; one without `tokenizer.json` is written in that form first."""
    if (path / "tokenizer.json").is_file():
        return load_tokenizer(path)
    with tempfile.TemporaryDirectory() as written:
        AutoTokenizer.from_pretrained(path, local_files_only=True).save_pretrained(written)
        return load_tokenizer(written)
