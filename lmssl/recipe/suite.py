"""An evaluation suite: which questions are asked of a model, one class per kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmssl.recipe.base import AsTuple, Float, Int, Section
from lmssl.recipe.data import AnyCorpus, Paths

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Evaluation(Section):
    """A named question; the name stands in tables, rows and cards."""

    name: Name
    """Name in tables, rows and cards."""


class LikelihoodEvaluation(Evaluation):
    """What is answered by how likely texts are."""

    prefix: Literal["auto", "none", "bos", "eos"] = "auto"
    """What stands before each text and is not predicted.

    `auto`: what the tokenizer puts around a text, and bos where the run trained with it. Without any, a causal model
    does not predict the first token. Masked models have `auto` or `none`."""


class LossEvaluation(LikelihoodEvaluation):
    """Exact loss, perplexity and bits per byte of a corpus, every document whole or by windows."""

    kind: Literal["loss"]
    corpus: AnyCorpus
    """As in a recipe's mixture; all of it is read, in the order of its files."""
    tokens: Int | None = Field(default=None, ge=1)
    """Stop after the document that completes so many tokens; null: all documents."""
    window: Literal["sliding", "document"] = "sliding"
    """`document`: each document is read as a whole, and must fit."""
    context_tokens: Int | None = Field(default=None, ge=8)
    """Tokens of a window; null: what the model reads, at most 1,024."""
    stride_tokens: Int | None = Field(default=None, ge=1)
    """Of a causal model: by how much windows move, and so how many tokens all but the first predict.

    Null: half of the window. Masked models read windows side by side."""
    mask_rate: Float = Field(default=0.15, gt=0, lt=1)
    """Of a masked model: share of the tokens that are predicted, always the same ones."""
    mask_strategy: Literal["token", "whole_word", "span"] = "token"
    """What is masked together, as in a recipe's objective."""
    mask_share: Float = Field(default=0.8, ge=0, le=1)
    """Share of the predicted tokens in whose place the mask token stands."""
    random_share: Float = Field(default=0.1, ge=0, le=1)
    """Share in whose place a random token stands; the rest stay as they are."""
    seed: Int = Field(default=1, ge=0, lt=2**63)
    """Of the masks."""
    max_bad_records: Int = Field(default=0, ge=0)
    """Unreadable records that are left out before the evaluation stops."""

    @model_validator(mode="after")
    def _check(self) -> LossEvaluation:
        context, stride = self.context_tokens, self.stride_tokens
        if context is not None and stride is not None and stride >= context:
            raise ValueError(
                f"stride_tokens: {stride} leaves no context in windows of context_tokens={context}; lower it"
            )
        if self.mask_share + self.random_share > 1:
            raise ValueError(
                f"random_share: {self.random_share} and mask_share={self.mask_share} are more than 1 together; "
                "lower one of them"
            )
        if self.corpus.kind == "tokens":
            raise ValueError("corpus: of ready-made tokens no text is known; give the corpus they were made from")
        for key in ("weight", "max_epochs"):
            if getattr(self.corpus, key) is not None:
                raise ValueError(f"corpus: {key} is for mixtures; leave it out")
        return self


class MinimalPairsEvaluation(LikelihoodEvaluation):
    """Pairs of sentences of which the good one should be likelier, as BLiMP's and Zorro's."""

    kind: Literal["minimal_pairs"]
    path: str | Paths
    """Files, globs or folders: `.jsonl` with a pair a line; `.txt` as Zorro's, two lines a pair, the bad one first."""
    good: str = "sentence_good"
    """Field of the good sentence."""
    bad: str = "sentence_bad"
    """Field of the bad one."""
    paradigm: str | None = None
    """Field that names the paradigm; null: `UID` where there is one, else the file's name."""
    within_word: bool = False
    """Of a masked model: hide also the rest of a word behind the token that is predicted (Kauf and Ivanova 2023)."""


class MultipleChoiceEvaluation(LikelihoodEvaluation):
    """Questions whose right answer should be the likeliest continuation."""

    kind: Literal["multiple_choice"]
    path: str | Paths
    """Files, globs or folders of `.jsonl`, a question a line."""
    question: str = "question"
    """Field of the text before the choices."""
    choices: str | Annotated[tuple[str, ...], AsTuple] = "choices"
    """Field that holds the list of choices, or the fields that hold one each."""
    answer: str = "answer"
    """Field of the right choice: its number from 0, its letter from A, or its text."""
    separator: str = " "
    """What stands between question and choice."""
    within_word: bool = False
    """As for minimal pairs."""


class HarnessEvaluation(Evaluation):
    """Tasks of the lm-evaluation-harness, run by its own loader; causal models only."""

    kind: Literal["lm_eval"]
    tasks: Annotated[tuple[str, ...], AsTuple] = Field(min_length=1)
    """Names of tasks; offline only those whose data is here."""
    include_path: str | None = None
    """A folder of further task files."""
    num_fewshot: Int | None = Field(default=None, ge=0)
    """Examples before each question; null: what the task says."""
    limit: Int | None = Field(default=None, ge=1)
    """Ask only the first so many questions of each task; null: all."""


class SamplesEvaluation(Evaluation):
    """Texts that the model writes, to look at."""

    kind: Literal["samples"]
    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], AsTuple] = Field(min_length=1)
    """What is continued; masked models fill their mask token, T5's its sentinels."""
    max_new_tokens: Int = Field(default=64, ge=1)
    """Longest continuation."""
    temperature: Float = Field(default=0.0, ge=0)
    """0: the likeliest token each time."""
    top_p: Float = Field(default=1.0, gt=0, le=1)
    """Draw among the likeliest tokens that have so much probability together."""
    seed: Int = Field(default=0, ge=0, lt=2**63)
    """Of the draws."""


AnyEvaluation = Annotated[
    LossEvaluation | MinimalPairsEvaluation | MultipleChoiceEvaluation | HarnessEvaluation | SamplesEvaluation,
    Field(discriminator="kind"),
]


class Suite(Section):
    """What `lmssl eval` asks, in order."""

    evaluations: Annotated[tuple[AnyEvaluation, ...], AsTuple] = Field(min_length=1)
    """The questions."""

    @model_validator(mode="after")
    def _check_names(self) -> Suite:
        seen: dict[str, int] = {}
        for index, evaluation in enumerate(self.evaluations):
            if evaluation.name in seen:
                first = seen[evaluation.name]
                raise ValueError(
                    f"evaluations.{index}.name: {evaluation.name} is also the name of evaluations.{first}; "
                    "choose another"
                )
            seen[evaluation.name] = index
        return self
