"""A suite, asked of a model: prepared once, then answered on one process or many, during training or after it.

`prepare_suite` reads and checks every file, so that all that is wrong shows before the first forward; `evaluate_suite`
may then be called again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from lmssl.errors import EvaluationError
from lmssl.evaluate.corpus_loss import prepare_loss
from lmssl.evaluate.minimal_pairs import prepare_pairs
from lmssl.evaluate.multiple_choice import prepare_choices
from lmssl.evaluate.questions import Question, Result
from lmssl.evaluate.reader import Likelihood, Reader
from lmssl.evaluate.score import score_rows
from lmssl.recipe.load import load_section
from lmssl.recipe.suite import (
    AnyEvaluation,
    LossEvaluation,
    MinimalPairsEvaluation,
    MultipleChoiceEvaluation,
    Suite,
)

LIKELIHOODS: dict[str, Likelihood] = {
    **dict.fromkeys(("causal", "prefix", "hybrid"), "causal"),
    "masked": "masked",
}
"""How the models of an objective say how likely a text is; others do not."""


def load_suite(path: Path) -> Suite:
    """Read a suite.

    Raises:
        RecipeError: anything about the file, its keys or values is wrong; names lines.
    """
    return load_section(Suite, path)


def prepare_suite(evaluations: Sequence[AnyEvaluation], reader: Reader) -> list[Question]:
    """Read the files of a suite's evaluations and make rows of them.

    Raises:
        DataError: a file or corpus cannot be read.
        EvaluationError: a file is wrong, the model does not read or answer what is asked, or an evaluation needs the
            stock model itself: `lm_eval` and `samples` are for `lmssl eval`.
    """
    return [prepare(evaluation, reader) for evaluation in evaluations]


def prepare(evaluation: AnyEvaluation, reader: Reader) -> Question:
    """One evaluation's rows; see `prepare_suite`."""
    match evaluation:
        case LossEvaluation():
            return prepare_loss(evaluation, reader)
        case MinimalPairsEvaluation():
            return prepare_pairs(evaluation, reader)
        case MultipleChoiceEvaluation():
            return prepare_choices(evaluation, reader)
    raise EvaluationError(
        f"an evaluation of kind {evaluation.kind} is not for the training loop",
        where=f"evaluation {evaluation.name!r}",
        remedy="leave it to `lmssl eval`, with a suite of its own",
    )


def evaluate_suite(
    module: nn.Module,
    questions: Sequence[Question],
    accelerator: Accelerator,
    *,
    batch_tokens: int,
    go_on: Callable[[], bool] = lambda: True,
) -> list[Result] | None:
    """Answer prepared questions, in their order; the same numbers on every process, for any number of them.

    Args:
        module: a stock model, or a `LossModule` or what wraps one; every process must call.
        batch_tokens: tokens of a forward on one device, padding included.
        go_on: asked before each forward, and must answer the same on every rank; after a no the result is None.
    """
    results = []
    for question in questions:
        scores = score_rows(
            module, question.rows, accelerator, causal=question.causal, batch_tokens=batch_tokens, go_on=go_on
        )
        if scores is None:
            return None
        results.append(question.finish(scores))
    return results


def result_row(evaluation: AnyEvaluation, result: Result, *, step: int | None, time: str) -> dict[str, Any]:
    """A line of `evaluations.jsonl`: what was asked, of which step, when (UTC, ISO 8601), and what came out."""
    row: dict[str, Any] = {"kind": evaluation.kind, "name": evaluation.name, "step": step, "metrics": result.metrics}
    if result.parts:
        row["parts"] = result.parts
    if result.samples:
        row["samples"] = list(result.samples)
    return row | {"settings": evaluation.model_dump(mode="json"), "time": time}
