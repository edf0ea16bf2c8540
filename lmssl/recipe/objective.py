"""The section `objective`: what the model predicts, one class per objective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmssl.recipe.base import Float, Int, Section
from lmssl.recipe.data import DataSection
from lmssl.recipe.encoders import BertModel
from lmssl.recipe.family import ContinuedModel, ModelBase


class CausalObjective(Section):
    """Next-token prediction."""

    kind: Literal["causal"]


class Masks(Section):
    """Which tokens are hidden, and what stands in their place."""

    rate: Float = Field(default=0.3, gt=0, lt=1)
    """Share of the text's tokens that are targets in training (Wettig et al. 2023)."""
    final_rate: Float | None = Field(default=None, gt=0, lt=1)
    """The share at the end of the run; null: `rate`."""
    decay_ratio: Float = Field(default=1.0, gt=0, le=1)
    """Share of the run, at its end, over which `rate` goes to `final_rate` in a straight line."""
    evaluation_rate: Float = Field(default=0.15, gt=0, lt=1)
    """Share of targets on held-out text, always the same ones."""
    strategy: Literal["token", "whole_word", "span"] = "token"
    """What is masked together: a token, all tokens of a word, or a run of tokens of geometric length."""
    mask_share: Float = Field(default=0.8, ge=0, le=1)
    """Share of targets in whose place the mask token stands (Devlin et al. 2019)."""
    random_share: Float = Field(default=0.1, ge=0, le=1)
    """Share in whose place a random token stands; the rest stay as they are."""
    mean_span_tokens: Float = Field(default=3.0, ge=1)
    """Mean of the geometric lengths of `span`, before they are cut at `max_span_tokens` (Joshi et al. 2020)."""
    max_span_tokens: Int = Field(default=10, ge=1)
    """Longest run of `span`."""
    max_word_tokens: Int = Field(default=16, ge=1)
    """Words of more tokens, as of writing without spaces, are masked in groups of so many."""

    @model_validator(mode="after")
    def _check_numbers(self) -> Masks:
        if self.mask_share + self.random_share > 1:
            raise ValueError(
                f"random_share: {self.random_share} and mask_share={self.mask_share} are more than 1 together; "
                "lower one of them"
            )
        if self.strategy == "span" and self.mean_span_tokens > self.max_span_tokens:
            raise ValueError(
                f"mean_span_tokens: {self.mean_span_tokens} is more than max_span_tokens={self.max_span_tokens}; "
                "lower it, or raise objective.max_span_tokens"
            )
        return self


class MaskedObjective(Masks):
    """Masked-token prediction, as BERT's."""

    kind: Literal["masked"]
    sentence_task: Literal["next", "order"] | None = None
    """A second task for `bert`: whether the second half follows (`next`), or both are swapped (`order`, as ALBERT)."""


class ReplacedObjective(Masks):
    """Replaced-token detection, as ELECTRA's: a small generator fills masks, the model finds what it filled."""

    kind: Literal["replaced"]
    rate: Float = Field(default=0.15, gt=0, lt=1)
    """Share of the text's tokens that the generator fills in (Clark et al. 2020)."""
    mask_share: Float = Field(default=1.0, ge=0, le=1)
    """Share of them that the generator sees as the mask token."""
    random_share: Float = Field(default=0.0, ge=0, le=1)
    """Share that it sees as a random token; the rest stay as they are."""
    detection_weight: Float = Field(default=50.0, gt=0)
    """Weight of the model's loss; the generator's has 1."""
    generator_ratio: Float = Field(default=0.25, gt=0, le=1)
    """Width of the generator's layers / the model's."""
    temperature: Float = Field(default=1.0, gt=0)
    """Of the generator's samples."""


class SpanObjective(Section):
    """Span corruption, as T5's: runs of tokens are replaced by sentinels, and the decoder writes them out."""

    kind: Literal["span"]
    rate: Float = Field(default=0.15, gt=0, lt=1)
    """Share of each segment's tokens in the spans (Raffel et al. 2020)."""
    mean_span_tokens: Float = Field(default=3.0, ge=1)
    """Mean length of a span; longer where the tokenizer's sentinels are too few for a long segment."""


class PrefixObjective(Section):
    """Prefix language modelling: the first part of a document is read in both directions, the rest predicted."""

    kind: Literal["prefix"]
    min_prefix_ratio: Float = Field(default=0.0, ge=0, le=1)
    """The prefix's least share of its segment; the share is uniform between both."""
    max_prefix_ratio: Float = Field(default=1.0, ge=0, le=1)
    """The prefix's largest share; of every segment at least one token is prefix, and one predicted."""

    @model_validator(mode="after")
    def _check_ratios(self) -> PrefixObjective:
        if self.min_prefix_ratio > self.max_prefix_ratio:
            raise ValueError(
                f"min_prefix_ratio: {self.min_prefix_ratio} is more than max_prefix_ratio={self.max_prefix_ratio}; "
                "lower it"
            )
        return self


class HybridObjective(Masks):
    """Next-token and masked-next-token prediction by one decoder (Charpentier & Samuel 2024, GPT-BERT)."""

    kind: Literal["hybrid"]
    masked_ratio: Float = Field(default=0.5, gt=0, lt=1)
    """Share of positions whose tokens are masked, and the weight of their loss; the others are read left to right."""


AnyObjective = Annotated[
    CausalObjective | MaskedObjective | ReplacedObjective | SpanObjective | PrefixObjective | HybridObjective,
    Field(discriminator="kind"),
]


def seps_per_segment(objective: AnyObjective) -> int:
    """Sep tokens that the data layout puts into each segment: two where segments become pairs of sentences."""
    return 2 if isinstance(objective, MaskedObjective) and objective.sentence_task is not None else 1


_DATA_DEFAULTS: Mapping[str, Mapping[str, bool]] = {
    "masked": {"bos": False, "eos": False, "cls": True, "sep": True},
    "replaced": {"bos": False, "eos": False, "cls": True, "sep": True},
    "hybrid": {"bos": False, "eos": False, "cls": True, "sep": True},
    "span": {"bos": False, "eos": False},
}


def data_defaults(kind: object) -> Mapping[str, bool]:
    """Values of `data`'s special tokens where a recipe with this kind of objective does not give them."""
    return _DATA_DEFAULTS.get(kind, {}) if isinstance(kind, str) else {}


def objective_problems(objective: AnyObjective, data: DataSection, model: ModelBase) -> Iterator[str]:
    """Sentences as in `recipe.sections.contradictions` for objectives, data and models that do not go together."""
    kind = objective.kind
    if isinstance(objective, MaskedObjective) and objective.sentence_task is not None:
        yield from _sentence_problems(objective, data, model)
    if kind in ("span", "prefix", "hybrid") and not data.document_attention:
        yield (
            f"data.document_attention: the objective {kind} keeps every document to itself; "
            "leave data.document_attention out"
        )
    if kind == "span":
        for role in ("bos", "eos", "cls", "sep"):
            if getattr(data, role):
                yield (
                    f"data.{role}: the objective span puts sentinels and eos into its examples itself; "
                    f"leave data.{role} out"
                )
    if kind != "causal" and data.fill_in_the_middle is not None and not (data.cls or data.sep):
        yield (
            f"data.fill_in_the_middle: it rearranges documents for next-token prediction, and the objective is {kind}; "
            "leave data.fill_in_the_middle out"
        )


def _sentence_problems(objective: MaskedObjective, data: DataSection, model: ModelBase) -> Iterator[str]:
    if objective.sentence_task == "next" and data.packing == "none":
        yield (
            "objective.sentence_task: next exchanges halves between segments of a sequence, and with "
            "data.packing=none every sequence has one segment; use order, or leave data.packing out"
        )
    if isinstance(model, ContinuedModel):
        pass  # its kind is known when it is opened
    elif not isinstance(model, BertModel):
        yield (
            f"objective.sentence_task: only bert has a class for pairs of sentences, and model.kind is "
            f"{getattr(model, 'kind', None)}; leave it out, or use bert"
        )
    elif model.type_vocab_size < 2:
        yield (
            f"model.type_vocab_size: pairs of sentences need 2 kinds of tokens, and this is {model.type_vocab_size}; "
            "leave it out"
        )
    if not data.document_attention:
        yield (
            "data.document_attention: objective.sentence_task asks about every segment by itself; "
            "leave data.document_attention out"
        )
    for role in ("cls", "sep"):
        if not getattr(data, role):
            yield f"data.{role}: objective.sentence_task needs it around the sentences; leave data.{role} out"
