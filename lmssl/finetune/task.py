"""What a task file may say: the labelled data, what is asked of it, and the protocol.

>>> implied_task(Path("train.jsonl"), {"sentence1": "a", "sentence2": "b", "label": 1}).task
Classification(kind='classification', text='sentence1', pair='sentence2', label='label')
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from lmssl.errors import DataError
from lmssl.recipe.base import AsTuple, Float, Int, Section
from lmssl.recipe.explain import refuse
from lmssl.recipe.load import load_section
from lmssl.recipe.override import apply_overrides
from lmssl.recipe.source import Source

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "tokens": ("accuracy", "macro_f1"),
    "instructions": ("loss", "perplexity"),
}
"""What is measured of each kind of task; the first is the one that counts unless the task says otherwise."""


class Classification(Section):
    """One of several labels for a text or a pair of texts."""

    kind: Literal["classification"]
    text: str = "text"
    """Field of the text."""
    pair: str | None = None
    """Field of the second text, where there are two."""
    label: str = "label"
    """Field of the label: text, a whole number, or true and false."""


class Regression(Section):
    """A number for a text or a pair of texts, such as how alike two sentences are."""

    kind: Literal["regression"]
    text: str = "text"
    """Field of the text."""
    pair: str | None = None
    """Field of the second text, where there are two."""
    label: str = "label"
    """Field of the number."""


class Tokens(Section):
    """A tag for every word of a text, such as parts of speech."""

    kind: Literal["tokens"]
    words: str = "words"
    """Field of the words: a list, or text with white space between them."""
    tags: str = "tags"
    """Field of their tags, as many."""


class Instructions(Section):
    """Answers to prompts, for causal models; only the answer is learned."""

    kind: Literal["instructions"]
    prompt: str = "prompt"
    """Field of what is given, used as it stands."""
    completion: str = "completion"
    """Field of the answer; the end-of-text token follows it."""
    messages: str | None = None
    """Field of a conversation, a list of {role, content} that ends with the answer; it takes the place of the two."""
    chat_template: str | None = None
    """File of the template that makes a conversation a text; null: the tokenizer's own."""


class TaskData(Section):
    """Where the rows are: .jsonl, .csv or .tsv files (also .gz and .zst), or folders of `save_to_disk`."""

    train: str
    """What is learned from."""
    validation: str | None = None
    """What rates are chosen by; null: `validation_ratio` of the training rows."""
    test: str | None = None
    """What nothing is chosen by; null: the validation rows are reported alone."""
    validation_ratio: Float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows that is held out by a hash of their text where `validation` is null."""


class Protocol(Section):
    """How often, how long and at which rates.

    Source: RoBERTa's protocol for GLUE (Liu et al. 2019, section 5.1): the median of five seeds for each of a few
    rates, warmup over 6 % of the steps, then linear decay to 0, weight decay 0.1. Batch and epochs are BERT's (Devlin
    et al. 2019). Unlike RoBERTa we score the last epoch and not the best one, which would be chosen by the rows that
    are reported.
    """

    epochs: Float = Field(default=3.0, gt=0)
    """Passes over the training rows; small sets want more, 10 to 20 (Mosbach et al. 2021)."""
    batch_size: Int = Field(default=32, ge=1)
    """Rows of one step."""
    lr: Annotated[tuple[Annotated[Float, Field(gt=0)], ...], AsTuple] = Field(default=(5e-5,), min_length=1)
    """Peak learning rates; the one with the best median on the validation rows is chosen."""
    seeds: Annotated[tuple[Annotated[Int, Field(ge=0)], ...], AsTuple] = Field(default=(1, 2, 3, 4, 5), min_length=1)
    """Each decides the new head, the order of the rows and dropout."""
    warmup_ratio: Float = Field(default=0.06, ge=0, lt=1)
    """Share of the steps over which the rate rises."""
    weight_decay: Float = Field(default=0.1, ge=0)
    """Of everything but biases and norms."""
    max_tokens: Int | None = Field(default=None, ge=4)
    """Longer texts are cut; null: what the model can read."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of matrix products."""

    @model_validator(mode="after")
    def _check_twice(self) -> Protocol:
        for name in ("lr", "seeds"):
            values: tuple[Any, ...] = getattr(self, name)
            twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
            if twice is not None:
                raise ValueError(f"{name}: {twice} stands there twice; remove one")
        return self


class TaskFile(Section):
    """One task to fine-tune on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the results."""
    task: Annotated[Classification | Regression | Tokens | Instructions, Field(discriminator="kind")]
    """What is asked."""
    data: TaskData
    """The rows."""
    metric: str | None = None
    """What rates are chosen by; null: the first of the kind's."""
    protocol: Protocol = Protocol()
    """How often and how long."""

    @model_validator(mode="after")
    def _check_metric(self) -> TaskFile:
        names = METRICS[self.task.kind]
        if self.metric is not None and self.metric not in names:
            raise ValueError(
                f"metric: {self.metric!r} is not measured of kind {self.task.kind}; choose {' or '.join(names)}"
            )
        return self

    @property
    def main_metric(self) -> str:
        """The metric that rates are chosen by."""
        return self.metric or METRICS[self.task.kind][0]


def load_task(path: Path, overrides: Sequence[str] = ()) -> TaskFile:
    """Read, override and check a task file.

    Raises:
        RecipeError: anything about the file, its keys and values, or an override is wrong.
    """
    return load_section(TaskFile, path, overrides)


PAIRS = (("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence"))
TEXTS = ("text", "sentence")
LABELS = ("label", "labels", "score")
WORDS = (("words", "tags"), ("tokens", "tags"), ("tokens", "pos_tags"), ("tokens", "ner_tags"))


def implied_task(path: Path, row: Mapping[str, Any], overrides: Sequence[str] = ()) -> TaskFile:
    """The task that a data file stands for by the names of its fields; some of its rows are held out.

    Raises:
        DataError: the names are not known ones.
        RecipeError: an override is wrong.
    """
    source = Source(str(path), {"name": _name(path), "task": _asked(path, row), "data": {"train": str(path)}})
    apply_overrides(source, overrides)
    try:
        return TaskFile.model_validate(source.data)
    except ValidationError as error:
        refuse(error, source, TaskFile)


def _asked(path: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    if "messages" in row:
        return {"kind": "instructions", "messages": "messages"}
    if {"prompt", "completion"} <= row.keys():
        return {"kind": "instructions"}
    for words, tags in WORDS:
        if {words, tags} <= row.keys():
            return {"kind": "tokens", "words": words, "tags": tags}
    label = next((name for name in LABELS if name in row), None)
    if label is not None:
        value = row[label]
        kind = "regression" if isinstance(value, float) and not value.is_integer() else "classification"
        for first, second in PAIRS:
            if {first, second} <= row.keys():
                return {"kind": kind, "text": first, "pair": second, "label": label}
        text = next((name for name in TEXTS if name in row), None)
        if text is not None:
            return {"kind": kind, "text": text, "label": label}
    raise DataError(
        f"the fields {', '.join(row) or '(none)'} do not say what the task is",
        where=str(path),
        remedy="write a task file that names the fields (docs/finetune.md), or call them text and label, "
        "sentence1, sentence2 and label, words and tags, or prompt and completion",
    )


def _name(path: Path) -> str:
    parts = [path.parent.name, path.name.partition(".")[0]]
    text = "-".join(part for part in parts if part not in ("", "..", "."))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "task"
