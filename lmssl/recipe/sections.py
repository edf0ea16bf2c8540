"""The recipe: its remaining sections, cross-checks and derived numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from lmssl.recipe.base import AsTuple, Float, Int, Section
from lmssl.recipe.data import DataSection, TokenizerSection
from lmssl.recipe.model import Gpt2Model, LlamaModel, ModelSection, Qwen3Model, null_sizes


class CausalObjective(Section):
    """Next-token prediction."""

    kind: Literal["causal"]


class AdamW(Section):
    """AdamW (Loshchilov & Hutter 2019), decay multiplied by the learning rate as in torch; fused."""

    kind: Literal["adamw"]
    lr: Float = Field(gt=0)
    """Peak learning rate."""
    weight_decay: Float = Field(default=0.1, ge=0)
    """Applied to matrices and embeddings, not to norms and biases."""
    betas: Annotated[tuple[Float, Float], AsTuple] = (0.9, 0.95)
    """GPT-3's values."""
    eps: Float = Field(default=1e-8, gt=0)
    max_grad_norm: Float | None = Field(default=1.0, gt=0)
    """Global gradient norm is clipped to this; null: off."""


class WsdSchedule(Section):
    """Warmup, stable, linear decay (Hu et al. 2024, MiniCPM)."""

    kind: Literal["wsd"]
    warmup_tokens: Int = Field(default=0, ge=0)
    decay_ratio: Float = Field(default=0.2, ge=0, le=1)
    """Share of `train.tokens` in the decay."""
    min_lr_ratio: Float = Field(default=0.0, ge=0, le=1)
    """Final learning rate / peak."""


class CosineSchedule(Section):
    """Warmup, then half a cosine to `min_lr_ratio`."""

    kind: Literal["cosine"]
    warmup_tokens: Int = Field(default=0, ge=0)
    min_lr_ratio: Float = Field(default=0.1, ge=0, le=1)
    """Final learning rate / peak."""


class LinearSchedule(Section):
    """Warmup, then a straight line to `min_lr_ratio`."""

    kind: Literal["linear"]
    warmup_tokens: Int = Field(default=0, ge=0)
    min_lr_ratio: Float = Field(default=0.0, ge=0, le=1)
    """Final learning rate / peak."""


AnySchedule = Annotated[WsdSchedule | CosineSchedule | LinearSchedule, Field(discriminator="kind")]


class TrainSection(Section):
    """Budget, batch and precision."""

    tokens: Int = Field(ge=1)
    """Training budget: positions x sequence_length, padding included."""
    batch_tokens: Int = Field(ge=1)
    """Tokens of one optimiser step over all devices; a multiple of `data.sequence_length`."""
    micro_batch_sequences: Int = Field(ge=1)
    """Sequences of one forward on one device; only memory and speed depend on it."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Autocast type of matrix products; weights and optimiser stay fp32."""
    compile: Literal["auto", "off", "layers", "model"] = "auto"
    """torch.compile: whole model, each layer, or off; `auto`: model on CPU, layers elsewhere, off for short runs."""
    deterministic: bool | None = None
    """Bit-exact repeats on one machine; null: on for CPU, where it costs nothing."""
    log_every_steps: Int = Field(default=10, ge=1)
    """Interval of lines in metrics.jsonl."""
    max_skipped_steps: Int = Field(default=10, ge=0)
    """Consecutive steps with non-finite gradients before the run stops."""


class CheckpointSection(Section):
    """When to save and how many checkpoints to keep; the last step is always saved."""

    every_steps: Int | None = Field(default=500, ge=1)
    """Null: only at the end."""
    keep_last: Int = Field(default=2, ge=1)


class EvaluateSection(Section):
    """When to evaluate on the validation split; the start and the end always are."""

    every_steps: Int | None = Field(default=None, ge=1)
    """Null: only before the first and after the last step."""


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
    objective: CausalObjective
    model: ModelSection
    optim: AdamW
    schedule: AnySchedule
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    track: TrackSection = TrackSection()

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
        """Sequences of one optimiser step over all devices."""
        return self.train.batch_tokens // self.data.sequence_length

    @property
    def steps(self) -> int:
        """Optimiser steps of the run; the budget is rounded up to whole steps."""
        return -(-self.train.tokens // self.train.batch_tokens)

    def vocab_size(self, num_tokens: int) -> int:
        """Rows of the embedding for a tokenizer of `num_tokens` ids."""
        multiple = self.tokenizer.pad_to_multiple
        return self.model.vocab_size or -(-num_tokens // multiple) * multiple

    @model_validator(mode="after")
    def _cross_check(self) -> Recipe:
        problems = contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def derived_fields(recipe: Recipe) -> dict[str, Any]:
    """Values of the fields that are null in the recipe and follow from others, by dotted path."""
    found: dict[str, Any] = {f"model.{k}": v for k, v in null_sizes(recipe.model, recipe.data.sequence_length).items()}
    if recipe.out is None:
        found["out"] = recipe.out_path
    if recipe.data.seed is None:
        found["data.seed"] = recipe.data_seed
    return found


def contradictions(recipe: Recipe) -> list[str]:
    """Sentences `path: what; remedy` for values that are each valid and cannot hold together."""
    return [
        *_batch_problems(recipe),
        *_mixture_problems(recipe),
        *_stage_problems(recipe),
        *_skip_problems(recipe),
        *_set_problems(recipe),
        *_schedule_problems(recipe),
        *_model_problems(recipe),
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
    if recipe.data.validation is None and recipe.evaluate.every_steps is not None:
        yield (
            "evaluate.every_steps: there is nothing to evaluate on, because data.validation is null; "
            "leave evaluate.every_steps out, or give data.validation"
        )


def _stage_problems(recipe: Recipe) -> Iterator[str]:
    mixture, stages, train = recipe.data.mixture, recipe.data.stages, recipe.train
    names = [corpus.name for corpus in mixture]
    for index, corpus in enumerate(mixture):
        if corpus.weight == 0 and not any(stage.weights.get(corpus.name) for stage in stages):
            yield (
                f"data.mixture.{index}.weight: the corpus {corpus.name} has weight 0 and no stage gives it more; "
                "take it out, or give it a weight here or in data.stages"
            )
    if all(corpus.weight == 0 for corpus in mixture):
        yield "data.mixture: every weight is 0, so the run has nothing to begin with; give a corpus a weight above 0"
    least = 0
    for index, stage in enumerate(stages):
        path, start = f"data.stages.{index}", stage.from_tokens
        if start % train.batch_tokens:
            near = max(1, round(start / train.batch_tokens)) * train.batch_tokens
            yield (
                f"{path}.from_tokens: {start} is not a multiple of train.batch_tokens={train.batch_tokens}; use {near}"
            )
        elif start <= least:
            yield f"{path}.from_tokens: {start} is not after {least}, where the stage before it begins; sort the stages"
        elif start >= train.tokens:
            yield f"{path}.from_tokens: {start} is not before the end, train.tokens={train.tokens}; lower it"
        least = max(least, start)
        for name in stage.weights:
            if name not in names:
                yield f"{path}.weights: there is no corpus {name} in data.mixture; the corpora are {', '.join(names)}"
        if not any(stage.weights.values()):
            yield f"{path}.weights: no corpus has a weight above 0; give at least one"


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


def _schedule_problems(recipe: Recipe) -> Iterator[str]:
    schedule, tokens = recipe.schedule, recipe.train.tokens
    if schedule.warmup_tokens > tokens:
        yield f"schedule.warmup_tokens: {schedule.warmup_tokens} is more than train.tokens={tokens}; lower it"
    elif isinstance(schedule, WsdSchedule) and schedule.warmup_tokens + schedule.decay_ratio * tokens > tokens:
        yield (
            f"schedule.decay_ratio: the decay's share {schedule.decay_ratio} of train.tokens={tokens} begins before "
            f"the warmup of {schedule.warmup_tokens} tokens ends; lower it or schedule.warmup_tokens"
        )


def _model_problems(recipe: Recipe) -> Iterator[str]:
    model, length = recipe.model, recipe.data.sequence_length
    for key in ("max_position_embeddings", "n_positions"):
        limit = getattr(model, key, None)
        if isinstance(limit, int) and limit < length:
            yield f"model.{key}: {limit} is less than data.sequence_length={length}; raise it, or leave it out"
    if isinstance(model, Gpt2Model) and model.n_embd % model.n_head:
        yield f"model.n_embd: {model.n_embd} is not a multiple of model.n_head={model.n_head}; change one of them"
    if isinstance(model, LlamaModel | Qwen3Model):
        yield from _rotary_problems(model)


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
