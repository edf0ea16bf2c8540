"""`lmssl eval`: a model or run, asked what a suite says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmssl.data.batch import validation_batches
from lmssl.data.order import end_position
from lmssl.data.stream import SequenceStream
from lmssl.errors import EvaluationError
from lmssl.evaluate import results
from lmssl.evaluate.generate import Sampling, write
from lmssl.evaluate.harness import run_harness
from lmssl.evaluate.loss import evaluate_loss
from lmssl.evaluate.questions import Question, Result
from lmssl.evaluate.subject import Subject, open_subject
from lmssl.evaluate.suite import evaluate_suite, load_suite, prepare, result_row
from lmssl.objective.base import SumObjective
from lmssl.objective.build import build_objective
from lmssl.objective.module import Function, LossModule, autocast
from lmssl.recipe.objective import seps_per_segment
from lmssl.recipe.suite import AnyEvaluation, HarnessEvaluation, SamplesEvaluation


@dataclass(frozen=True)
class Order:
    """What `lmssl eval` is asked to do."""

    path: Path
    """A transformers folder or a run folder."""
    suite: Path | None
    """None: the held-out text of the run."""
    step: int | None = None
    out: Path | None = None
    """A file that the results are added to as JSON lines."""
    batch_tokens: int = 8192
    """Tokens of a forward, padding included."""
    bf16: bool = False
    """Matrix products in bfloat16."""
    ema: bool = False
    """Of a run, the moving average of its weights."""

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products."""
        return torch.bfloat16 if self.bf16 else torch.float32


def evaluate_now(order: Order, accelerator: Accelerator, *, time: str, as_json: bool) -> list[dict[str, Any]]:
    """Evaluate, print tables or JSON, and add the results to the run's `evaluations.jsonl` and to `order.out`.

    Args:
        time: in UTC, ISO 8601.
    Raises:
        LmsslError: the suite, the model, a file or an output is wrong.
    """
    suite = None if order.suite is None else load_suite(order.suite)  # a wrong suite is refused before a model is read
    subject = open_subject(order.path, step=order.step, ema=order.ema)
    if suite is None:
        rows = [_held_out(subject, order, accelerator, time)]
    else:
        asked = _ask(suite.evaluations, subject, order, accelerator)
        rows = [result_row(e, found, step=subject.step, time=time) for e, found in asked]
    if order.ema:
        rows = [{**row, "weights": "ema"} for row in rows]
    if accelerator.is_main_process:
        if subject.recipe is not None:
            results.append_rows(order.path / results.FILE, rows)
        if order.out is not None:
            results.append_rows(order.out, rows)
        if as_json:
            print(*(json.dumps(row, ensure_ascii=False) for row in rows), sep="\n")
        else:
            results.show(rows, Console(soft_wrap=True, highlight=False))
    return rows


def _ask(
    evaluations: Sequence[AnyEvaluation], subject: Subject, order: Order, accelerator: Accelerator
) -> list[tuple[AnyEvaluation, Result]]:
    """Answers in the suite's order; everything is read and checked before the first forward."""
    apart = (HarnessEvaluation, SamplesEvaluation)
    prepared: list[tuple[AnyEvaluation, Question | None]] = [
        (e, None if isinstance(e, apart) else prepare(e, subject.reader)) for e in evaluations
    ]
    subject.model.to(accelerator.device)
    module = _Precision(subject.model, order.dtype)
    found: dict[str, Result] = {}
    for evaluation, question in prepared:
        if question is not None:
            answers = evaluate_suite(module, [question], accelerator, batch_tokens=order.batch_tokens)
            assert answers is not None  # nobody stops it
            found[evaluation.name] = answers[0]
    for evaluation, _ in prepared:  # these give the model another attention, so they come last
        if isinstance(evaluation, apart):
            with torch.no_grad(), autocast(accelerator.device, order.dtype):
                found[evaluation.name] = _ask_stock(evaluation, subject, order, accelerator)
    return [(evaluation, found[evaluation.name]) for evaluation in evaluations]


def _ask_stock(
    evaluation: HarnessEvaluation | SamplesEvaluation, subject: Subject, order: Order, accelerator: Accelerator
) -> Result:
    if isinstance(evaluation, SamplesEvaluation):
        sampling = Sampling(evaluation.max_new_tokens, evaluation.temperature, evaluation.top_p, evaluation.seed)
        texts = [write(subject, prompt, sampling) for prompt in evaluation.prompts]
        pairs = zip(evaluation.prompts, texts, strict=True)
        return Result({}, samples=tuple({"prompt": prompt, "text": text} for prompt, text in pairs))
    if accelerator.num_processes > 1:
        raise EvaluationError(
            "lm-eval is asked by one process",
            where=f"evaluation {evaluation.name!r}",
            remedy="run this suite without a launcher",
        )
    longest = subject.reader.context_tokens(None, where=evaluation.name)
    return run_harness(evaluation, subject, batch_rows=max(1, order.batch_tokens // longest))


class _Precision(nn.Module):
    """A stock model that is called as a `LossModule` is, under its autocast."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, inputs: dict[str, Tensor], function: Function) -> dict[str, Tensor]:
        """What the function makes of the model and the inputs."""
        with autocast(next(iter(inputs.values())).device, self.dtype):
            return function(self.model, inputs)


def _held_out(subject: Subject, order: Order, accelerator: Accelerator, time: str) -> dict[str, Any]:
    """The loss on the run's own held-out text, as training measures it."""
    recipe = subject.recipe
    if recipe is None or recipe.data.validation is None:
        what = "a transformers folder has" if recipe is None else "the run has"
        raise EvaluationError(
            f"{what} no held-out text of its own", where=str(order.path), remedy="say what to ask with --suite FILE"
        )
    num_positions = end_position(recipe.batches, recipe.data.skip)
    objective = build_objective(recipe, subject.tokenizer, num_positions=num_positions)
    if not isinstance(objective, SumObjective) or recipe.objective.kind == "replaced":
        raise EvaluationError(
            f"the objective {recipe.objective.kind} is not evaluated apart from its run",
            where=str(order.path),
            remedy="say what to ask with --suite FILE",
        )
    stream = SequenceStream.open(
        recipe.data,
        subject.tokenizer,
        seed=recipe.data_seed,
        cache_dir=Path(recipe.data.cache).expanduser(),
        seps_per_segment=seps_per_segment(recipe.objective),
    )
    module = LossModule(subject.model, objective, bf16=order.bf16).to(accelerator.device)
    size = max(1, order.batch_tokens // recipe.data.sequence_length)
    splits = {
        split.corpus: validation_batches(
            split,
            micro_batch_sequences=size,
            world_size=accelerator.num_processes,
            rank=accelerator.process_index,
            prepare=lambda batch: objective.prepare(batch, evaluation=True),
        )
        for split in (*stream.validation(), *stream.validation_sets())
    }
    apart = {split.corpus for split in stream.validation_sets()}
    found = evaluate_loss(module, objective, splits, accelerator, apart=apart)
    assert found is not None  # nobody stops it
    parts = {
        name: {"loss": r.loss, "bits_per_byte": r.bits_per_byte, "num_targets": r.num_targets, **r.further}
        for name, r in found.items()
    }
    total = parts.pop("")
    row = {"kind": "loss", "name": "held-out", "step": subject.step, "metrics": total, "parts": parts}
    return row | {"settings": {}, "time": time}
