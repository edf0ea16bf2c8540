"""The recipe: its remaining sections, cross-checks and derived numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from lmssl.recipe.base import AsTuple, Int, Section
from lmssl.recipe.batches import BatchPlan, kept_before, plan_batches
from lmssl.recipe.card import CardSection
from lmssl.recipe.checkpoint import CheckpointSection, checkpoint_problems
from lmssl.recipe.data import DataSection, TokenizerSection, special_token_problems
from lmssl.recipe.encoders import EncoderModel, T5Model, encoder_problems
from lmssl.recipe.evaluate import EvaluateSection, evaluate_problems
from lmssl.recipe.family import ModelBase
from lmssl.recipe.guard import GuardSection
from lmssl.recipe.model import Gpt2Model, LlamaModel, ModelSection, Qwen3Model, lacking_kind, null_sizes
from lmssl.recipe.objective import AnyObjective, ReplacedObjective, data_defaults, objective_problems
from lmssl.recipe.optim import AnyOptim, optim_problems
from lmssl.recipe.schedule import AnySchedule, BranchSection, schedule_problems
from lmssl.recipe.train import TrainSection


class TrackSection(Section):
    """Experiment trackers beside metrics.jsonl."""

    model_config = ConfigDict(populate_by_name=True)

    trackers: Annotated[
        tuple[
            Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab"],
            ...,
        ],
        AsTuple,
    ] = Field(default=(), alias="with")
    """Names that accelerate's `log_with` knows; the package must be installed."""


class Recipe(Section):
    """One pretraining run, whole: what is trained, on what, and for how long."""

    model_config = ConfigDict(protected_namespaces=())

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its default folder."""
    seed: Int = Field(default=1, ge=0, lt=2**63)
    """Seed of the initial weights; `data.seed` defaults to it."""
    out: str | None = None
    """Run folder; null: runs/<name>."""
    tokenizer: TokenizerSection
    data: DataSection
    objective: AnyObjective
    model: ModelSection
    optim: AnyOptim
    schedule: AnySchedule
    train: TrainSection
    branch: BranchSection | None = None
    """Null: the run begins with its first step."""
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    evaluate: EvaluateSection = EvaluateSection()
    track: TrackSection = TrackSection()
    card: CardSection = CardSection()

    @property
    def out_path(self) -> str:
        """Folder of the run."""
        return self.out or f"runs/{self.name}"

    @property
    def data_seed(self) -> int:
        """Seed of order, split and masks."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def batch_sequences(self) -> int:
        """Sequences of one optimiser step over all devices, after `train.batch_warmup`."""
        return self.train.batch_tokens // self.data.sequence_length

    @property
    def batches(self) -> BatchPlan:
        """Which positions each step reads."""
        starts = self.data.starts
        kept = tuple((kept_before(first, self.data.skip), length) for first, length in starts)
        return plan_batches(self.train.tokens, self.train.ramp, kept)

    def rope_theta(self, step: int) -> float | None:
        """The base of rotary positions in a step; None: no stage changes it."""
        if all(stage.rope_theta is None for stage in self.data.stages):
            return None
        theta: float = getattr(self.model, rope_field(self.model) or "rope_theta")
        for stage, (first, _) in zip(self.data.stages, self.data.starts[1:], strict=True):
            if kept_before(first, self.data.skip) <= self.batches.first_position(step):
                theta = stage.rope_theta or theta
        return theta

    @property
    def steps(self) -> int:
        """Optimiser steps of the run; the budget is rounded up to whole steps."""
        return self.batches.num_steps

    def vocab_size(self, num_tokens: int) -> int:
        """Rows of the embedding for a tokenizer of `num_tokens` ids."""
        multiple = self.tokenizer.pad_to_multiple
        return self.model.vocab_size or -(-num_tokens // multiple) * multiple

    @model_validator(mode="before")
    @classmethod
    def _defaults_by_objective(cls, given: Any) -> Any:
        """Special tokens in the data that the kind of objective wants, where the recipe does not say."""
        data, objective = (given.get(key) if isinstance(given, dict) else None for key in ("data", "objective"))
        if not isinstance(data, dict) or not isinstance(objective, dict):
            return given
        return given | {"data": {**data_defaults(objective.get("kind")), **data}}

    @model_validator(mode="after")
    def _cross_check(self) -> Recipe:
        problems = contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def derived_fields(recipe: Recipe) -> dict[str, Any]:
    """Values of the fields that are null in the recipe and follow from others, by dotted path."""
    found: dict[str, Any] = {f"model.{k}": v for k, v in null_sizes(recipe.model, recipe.data.longest_sequence).items()}
    if recipe.out is None:
        found["out"] = recipe.out_path
    if recipe.data.seed is None:
        found["data.seed"] = recipe.data_seed
    return found


def contradictions(recipe: Recipe) -> list[str]:
    """Sentences `path: what; remedy` for values that are each valid and cannot hold together."""
    return [
        *_batch_problems(recipe),
        *_warmup_problems(recipe),
        *_mixture_problems(recipe),
        *_stage_problems(recipe),
        *_length_problems(recipe),
        *_skip_problems(recipe),
        *_set_problems(recipe),
        *special_token_problems(recipe.data),
        *objective_problems(recipe.objective, recipe.data, recipe.model),
        *schedule_problems(recipe.schedule, tokens=recipe.train.tokens),
        *optim_problems(recipe.optim, has_head=_has_head(recipe)),
        *_model_problems(recipe),
        *checkpoint_problems(recipe.checkpoint, evaluate_every_steps=recipe.evaluate.every_steps),
    ]


def _batch_problems(recipe: Recipe) -> Iterator[str]:
    length, train = recipe.data.sequence_length, recipe.train
    if train.batch_tokens % length:
        near = max(1, round(train.batch_tokens / length)) * length
        yield f"train.batch_tokens: {train.batch_tokens} is not a multiple of data.sequence_length={length}; use {near}"
    elif train.micro_batch_sequences > recipe.batch_sequences:
        yield (
            f"train.micro_batch_sequences: {train.micro_batch_sequences} is more than the {recipe.batch_sequences} "
            "sequences of a batch (train.batch_tokens / data.sequence_length); "
            f"use at most {recipe.batch_sequences}"
        )


def _warmup_problems(recipe: Recipe) -> Iterator[str]:
    warmup, train, length = recipe.train.batch_warmup, recipe.train, recipe.data.sequence_length
    if warmup is None:
        return
    path, start = "train.batch_warmup", warmup.from_tokens
    if start % length:
        near = max(1, round(start / length)) * length
        yield f"{path}.from_tokens: {start} is not a multiple of data.sequence_length={length}; use {near}"
    elif start > train.batch_tokens:
        yield f"{path}.from_tokens: {start} is more than train.batch_tokens={train.batch_tokens}; lower it"
    if warmup.tokens > train.tokens:
        yield f"{path}.tokens: {warmup.tokens} is more than train.tokens={train.tokens}; lower it"


def _mixture_problems(recipe: Recipe) -> Iterator[str]:
    mixture = recipe.data.mixture
    weighted = [corpus.weight is not None for corpus in mixture]
    if any(weighted) and not all(weighted):
        missing = weighted.index(False)
        yield (
            f"data.mixture.{missing}: the corpus {mixture[missing].name} has no weight and others have one; "
            "give all of them a weight, or none"
        )
    seen: dict[str, int] = {}
    for index, corpus in enumerate(mixture):
        if corpus.name in seen:
            first = seen[corpus.name]
            yield f"data.mixture.{index}.name: {corpus.name} is also the name of data.mixture.{first}; choose another"
        seen.setdefault(corpus.name, index)
    yield from evaluate_problems(recipe.evaluate, has_validation=recipe.data.validation is not None)


def _stage_problems(recipe: Recipe) -> Iterator[str]:
    mixture, stages, train = recipe.data.mixture, recipe.data.stages, recipe.train
    names = [corpus.name for corpus in mixture]
    for index, corpus in enumerate(mixture):
        if corpus.weight == 0 and not any((stage.weights or {}).get(corpus.name) for stage in stages):
            yield (
                f"data.mixture.{index}.weight: the corpus {corpus.name} has weight 0 and no stage gives it more; "
                "take it out, or give it a weight here or in data.stages"
            )
    if all(corpus.weight == 0 for corpus in mixture):
        yield "data.mixture: every weight is 0, so the run has nothing to begin with; give a corpus a weight above 0"
    least = 0
    for index, stage in enumerate(stages):
        path, start = f"data.stages.{index}", stage.from_tokens
        before, after = _steps_around(train, start)
        if train.batch_warmup is None and start not in (before, after):
            near = max(1, round(start / train.batch_tokens)) * train.batch_tokens
            yield (
                f"{path}.from_tokens: {start} is not a multiple of train.batch_tokens={train.batch_tokens}; use {near}"
            )
        elif start not in (before, after):
            use = f"{before} or {after}" if before > 0 else f"{after}"
            yield f"{path}.from_tokens: no step begins at {start} under train.batch_warmup; use {use}"
        elif start <= least:
            yield f"{path}.from_tokens: {start} is not after {least}, where the stage before it begins; sort the stages"
        elif start >= train.tokens:
            yield f"{path}.from_tokens: {start} is not before the end, train.tokens={train.tokens}; lower it"
        least = max(least, start)
        for name in stage.weights or ():
            if name not in names:
                yield f"{path}.weights: there is no corpus {name} in data.mixture; the corpora are {', '.join(names)}"
        if stage.weights is not None and not any(stage.weights.values()):
            yield f"{path}.weights: no corpus has a weight above 0; give at least one"


def _length_problems(recipe: Recipe) -> Iterator[str]:
    train, stages = recipe.train, recipe.data.stages
    sizes = {"train.batch_tokens": train.batch_tokens}
    if train.batch_warmup is not None:
        sizes["train.batch_warmup.from_tokens"] = train.batch_warmup.from_tokens
    for index, stage in enumerate(stages):
        path, length = f"data.stages.{index}", stage.sequence_length
        for name, size in sizes.items():
            if length is not None and size % length:
                yield f"{path}.sequence_length: {length} does not divide {name}={size}; change one of them"
        if stage.rope_theta is not None and getattr(recipe.model, "rope_theta", 0) is None:
            yield f"{path}.rope_theta: it follows a base that is not said; give model.rope_theta"
        elif stage.rope_theta is not None and not (
            {"rope_theta", "global_rope_theta"} & recipe.model.model_dump().keys()
        ):
            yield f"{path}.rope_theta: of the kind {recipe.model.kind} none is known; leave it out"
        if (stage.weights, length, stage.rope_theta) == (None, None, None):
            yield f"{path}: nothing changes here; give it weights, a sequence_length or a rope_theta"
    limited = next((corpus.name for corpus in recipe.data.mixture if corpus.max_epochs is not None), None)
    if limited is not None and any(stage.sequence_length for stage in stages):
        yield (
            f"data.mixture: the corpus {limited} has max_epochs, whose sequences are counted ahead in one length; "
            "leave max_epochs out, or sequence_length in data.stages"
        )


def rope_field(model: ModelBase) -> str | None:
    """The field of a model that a stage's `rope_theta` changes; None: it has no rotary positions."""
    names = type(model).model_fields
    return next((name for name in ("rope_theta", "global_rope_theta") if name in names), None)


def _steps_around(train: TrainSection, tokens: int) -> tuple[int, int]:
    """Tokens before the step that reads a token, and before the step after it."""
    plan = plan_batches(train.tokens, train.ramp, ((0, 1),))
    step = plan.step_at_token(tokens)
    return plan.tokens_before(step), plan.tokens_before(step + 1)


def _skip_problems(recipe: Recipe) -> Iterator[str]:
    last = 0
    for index, (start, end) in enumerate(recipe.data.skip):
        path = f"data.skip.{index}"
        if start < 0 or start >= end:
            yield f"{path}: [{start}, {end}] holds no positions; write [first, last + 1], from 0 on"
        elif start < last:
            yield f"{path}: [{start}, {end}] begins before {last}, where an earlier range ends; sort and merge them"
        last = max(last, end)


def _set_problems(recipe: Recipe) -> Iterator[str]:
    names = {corpus.name: f"data.mixture.{index}" for index, corpus in enumerate(recipe.data.mixture)}
    for index, corpus in enumerate(recipe.data.validation.sets if recipe.data.validation is not None else ()):
        path = f"data.validation.sets.{index}"
        if corpus.name in names:
            yield f"{path}.name: {corpus.name} is also the name of {names[corpus.name]}; choose another"
        names.setdefault(corpus.name, path)
        for key in ("weight", "max_epochs"):
            if getattr(corpus, key) is not None:
                yield f"{path}.{key}: a validation set is not trained on; leave {key} out"


def _has_head(recipe: Recipe) -> bool:
    """Whether there is an output matrix that is not the embedding; ELECTRA and BERT's second task have small ones."""
    objective = recipe.objective
    answers = isinstance(objective, ReplacedObjective) or getattr(objective, "sentence_task", None) is not None
    tied = getattr(recipe.model, "tie_word_embeddings", None)  # a continued model says so itself, later
    return answers or tied is not True


def _model_problems(recipe: Recipe) -> Iterator[str]:
    model, length = recipe.model, recipe.data.longest_sequence
    name = "data.sequence_length" if length == recipe.data.sequence_length else "the longest sequence_length"
    for key in ("max_position_embeddings", "n_positions"):
        limit = getattr(model, key, None)
        if isinstance(limit, int) and limit < length:
            yield f"model.{key}: {limit} is less than {name}={length}; raise it, or leave it out"
    if (needs := lacking_kind(model, recipe.objective.kind)) is not None:
        yield f"model.kind: {needs}"
    if isinstance(model, Gpt2Model) and model.n_embd % model.n_head:
        yield f"model.n_embd: {model.n_embd} is not a multiple of model.n_head={model.n_head}; change one of them"
    if isinstance(model, LlamaModel | Qwen3Model):
        yield from _rotary_problems(model)
    if isinstance(model, EncoderModel | T5Model):
        yield from encoder_problems(model)


def _rotary_problems(model: LlamaModel | Qwen3Model) -> Iterator[str]:
    width, heads, groups = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    if groups is not None and heads % groups:
        yield f"model.num_key_value_heads: {groups} does not divide model.num_attention_heads={heads}; change one"
    if model.head_dim is None and width % heads:
        yield (
            f"model.hidden_size: {width} is not a multiple of model.num_attention_heads={heads}; "
            "change one of them, or give model.head_dim"
        )
        return
    head_dim = model.head_dim or width // heads
    if head_dim % 2:
        name = "head_dim" if model.head_dim else "num_attention_heads"
        yield f"model.{name}: rotary positions need heads of even width, these have {head_dim}; make it even"
