"""An open run: its batches, what comes before a step, evaluation and saving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig

from lmssl.checkpoint import Saver
from lmssl.data.batch import training_batches, validation_batches
from lmssl.data.stream import SequenceStream
from lmssl.data.validation import ValidationSplit
from lmssl.errors import LmsslError
from lmssl.evaluate.generate import Sampling
from lmssl.evaluate.loss import LossResult, evaluate_loss
from lmssl.evaluate.questions import Question
from lmssl.evaluate.reader import Reader
from lmssl.evaluate.samples import Blank, Kind, held_out, samples_row, write_samples
from lmssl.evaluate.suite import evaluate_suite, result_row
from lmssl.model import native
from lmssl.model.rope import rope_theta, set_rope_theta
from lmssl.objective.base import MicroBatch, Objective, SumObjective, Unpadded
from lmssl.objective.module import LossModule
from lmssl.recipe.evaluate import SamplesSection
from lmssl.recipe.load import resolved_yaml
from lmssl.recipe.sections import Recipe
from lmssl.recipe.suite import AnyEvaluation
from lmssl.train.backend import Backend, Replicated
from lmssl.train.console import Report
from lmssl.train.proof import has_dropout, step_difference
from lmssl.train.set_aside import SetAside
from lmssl.train.state import TrainState


@dataclass(frozen=True)
class Samples:
    """Texts that the model is to write at each evaluation."""

    section: SamplesSection
    kind: Kind
    reader: Reader
    prompts: Sequence[Blank]
    """Read and checked before the first step; none: held-out documents."""


@dataclass(frozen=True)
class Asked:
    """A suite and samples, read and checked before the first step."""

    evaluations: Sequence[AnyEvaluation] = ()
    questions: Sequence[Question] = ()
    samples: Samples | None = None


_NUM_HELD_OUT = 2
"""Documents that are continued or filled where there are no prompts."""


@dataclass
class Session:
    """One execution of a run, from opening to the last step."""

    recipe: Recipe
    run: Path
    config: PreTrainedConfig
    stream: SequenceStream
    objective: Objective
    backend: Backend
    """The module with its optimiser, spread over processes as the launch asks."""
    state: TrainState
    compiled: str
    report: Report
    set_aside: SetAside
    saver: Saver
    asked: Asked = Asked()
    proven_shapes: set[tuple[torch.Size, ...]] = field(default_factory=set)
    """Of inputs on which the step was compared with the plain one."""

    @property
    def accelerator(self) -> Accelerator:
        """Device, rank and number of processes."""
        return self.backend.accelerator

    @property
    def core(self) -> LossModule:
        """The module itself: names and sizes."""
        return self.backend.core

    def batches(self) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches, step by step, from the cursor to the end of the run."""
        return training_batches(
            self.stream,
            plan=self.recipe.batches,
            micro_batch_sequences=self.recipe.train.micro_batch_sequences,
            world_size=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            start_step=self.state.step,
            num_steps=self.recipe.steps - self.state.step,
            prepare=self._prepare(static=self.compiled != "off"),
            workers=self.recipe.data.workers,
        )

    def begin_step(self, micro: MicroBatch) -> None:
        """What comes before an update: its stage's settings, and a proof of a step that is not plain."""
        self.follow_stage()
        self.prove_step(micro)

    def restore_rope_theta(self) -> None:
        """Give a model that is continued the rotary base of its last step, with which it may be evaluated or saved."""
        theta = self.recipe.rope_theta(self.state.step - 1) if self.state.step else None
        if theta is not None:
            set_rope_theta(self.core.model, theta)

    def follow_stage(self) -> None:
        """Give the model the rotary base of the next step's stage, and say what the stage changes."""
        step, plan = self.state.step, self.recipe.batches
        theta = self.recipe.rope_theta(step)
        if theta is not None and theta != rope_theta(self.core.model):
            set_rope_theta(self.core.model, theta)
            self.report(f"from step {step + 1} on, the base of rotary positions is {theta:g}")
        if step and plan.sequence_length(step) != plan.sequence_length(step - 1):
            self.report(f"from step {step + 1} on, sequences have {plan.sequence_length(step)} tokens")

    def prove_step(self, micro: MicroBatch) -> None:
        """Where a step on CPU differs from the plain one on a micro-batch, say so and go on with the plain one.

        Compiled, shapes that were compared before are not compared again; kernels are compared once.
        """
        compiled = self.compiled != "off"
        shapes = tuple(tensor.shape for tensor in micro.inputs.values()) if compiled else ()
        plain = not (compiled or native.in_use())
        if plain or self.accelerator.device.type != "cpu" or shapes in self.proven_shapes:
            return
        self.proven_shapes.add(shapes)
        whole = isinstance(self.backend, Replicated)  # the proof takes gradients past whatever wraps the module
        otherwise = compiled and has_dropout(self.core.model)
        if not whole or not isinstance(self.objective, SumObjective) or otherwise:
            return
        difference = step_difference(self.core, micro.inputs, self.objective.weights)
        if difference is None:
            return
        if compiled:
            torch.compiler.set_stance("force_eager")
            self.compiled = "off"
        native.set_aside()
        whose = "the compiled step" if compiled else "the step by our own kernels"
        instead = "without compilation" if compiled else "with torch's"
        remedy = "another compiler may be right, such as CXX=clang++"
        self.report(f"{whose} is wrong, it has {difference}: going on {instead}; {remedy}")

    def evaluate(self, go_on: Callable[[], bool] = lambda: True) -> dict[str, LossResult] | None:
        """Loss on the held-out split and on validation sets; None where there is none, or after a no of `go_on`."""
        if self.recipe.data.validation is None or not isinstance(self.objective, SumObjective):
            return None
        sets = self.stream.validation_sets()
        splits = {split.corpus: self._validation_batches(split) for split in (*self.stream.validation(), *sets)}
        apart = {split.corpus for split in sets}
        module = self.backend.evaluated
        return evaluate_loss(module, self.objective, splits, self.accelerator, apart=apart, go_on=go_on)

    def answers(self, go_on: Callable[[], bool], *, time: str) -> list[dict[str, Any]] | None:
        """What suite and samples give, as lines of `evaluations.jsonl`; every rank must call.

        None: after a no of `go_on`.

        Args:
            time: of the evaluation, in UTC, ISO 8601.
        """
        asked = self._suite_answers(go_on, time)
        written = None if asked is None else self._samples(go_on, time)
        return None if asked is None or written is None else asked + written

    def _samples(self, go_on: Callable[[], bool], time: str) -> list[dict[str, Any]] | None:
        samples = self.asked.samples
        if samples is None:
            return []
        section, kind, reader = samples.section, samples.kind, samples.reader
        blanks = samples.prompts or held_out(
            kind, reader, self.stream.validation(), count=_NUM_HELD_OUT, num_tokens=section.max_new_tokens
        )
        seed = (self.recipe.seed * 2_000_003 + self.state.step) % 2**63  # of nothing but the two
        sampling = Sampling(section.max_new_tokens, section.temperature, section.top_p, seed)
        found = write_samples(
            self.backend.evaluated, kind, blanks, reader, self.accelerator, sampling=sampling, go_on=go_on
        )
        if found is None:
            return None
        return [samples_row(found, section.model_dump(mode="json"), step=self.state.step, time=time)]

    def _suite_answers(self, go_on: Callable[[], bool], time: str) -> list[dict[str, Any]] | None:
        if not self.asked.evaluations:
            return []
        batch_tokens = self.recipe.train.micro_batch_sequences * self.recipe.data.sequence_length
        found = evaluate_suite(
            self.backend.evaluated, self.asked.questions, self.accelerator, batch_tokens=batch_tokens, go_on=go_on
        )
        if found is None:
            return None
        asked = zip(self.asked.evaluations, found, strict=True)
        return [result_row(evaluation, result, step=self.state.step, time=time) for evaluation, result in asked]

    def _validation_batches(self, split: ValidationSplit) -> Iterator[MicroBatch]:
        return validation_batches(
            split,
            micro_batch_sequences=self.recipe.train.micro_batch_sequences,
            world_size=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            prepare=partial(self._prepare(static=False), evaluation=True),  # evaluation is never compiled
        )

    def _prepare(self, *, static: bool) -> Unpadded | Callable[..., MicroBatch]:
        """What makes micro-batches; without padding at the rows' ends where shapes need not be static."""
        unpadded = self.recipe.data.packing == "none" and not static
        return Unpadded(self.objective) if unpadded else self.objective.prepare

    def save(self) -> None:
        """Save the present state; every rank must call. Asynchronous, it is written when `saver.wait()` returns.

        Raises:
            CheckpointError: on every rank, where this save or the one before failed on one.
        """
        texts = {}
        if self.backend.loss_scale is not None:
            self.state.loss_scale = self.backend.loss_scale.state()
        if self.accelerator.is_main_process:
            self.state.epochs = self.stream.epochs_at(self.state.cursor)
            texts = {
                "state.json": self.state.to_json(),
                "ledger.jsonl": self.stream.ledger_at(self.state.cursor).text(),
                "recipe.yaml": resolved_yaml(self.recipe),
                "config.json": self.config.to_json_string(use_diff=False),
            }
        evaluated = self.state.evaluation if self.state.evaluation.get("step") == self.state.step else {}
        self.saver.save(
            self.state.step,
            tensors=self.backend.owned_tensors,
            texts=texts,
            tokens=self.state.tokens_seen,
            finite=self.state.consecutive_skips == 0,
            validation_loss=evaluated.get("loss"),
        )

    def list_set_aside(self) -> None:
        """Bring the lists of what was left out up to the cursor, from the main process; training never fails on it."""
        if self.accelerator.is_main_process:
            try:
                self.set_aside.write(self.state.cursor)
            except (LmsslError, OSError) as error:
                self.report(f"what was left out of the text cannot be listed, training goes on: {error}")
