"""One run of the stock Trainer, and the protocol: every rate with every seed, the median of the seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from lmssl.errors import TrainingError
from lmssl.finetune.inputs import IGNORE, Encoded, encode
from lmssl.finetune.rows import Example
from lmssl.finetune.scores import class_scores, loss_scores, number_scores
from lmssl.finetune.splits import Splits, majority
from lmssl.finetune.start import Start, build_model
from lmssl.finetune.task import METRICS, Classification, Instructions, Regression, TaskFile, Tokens

Scores = dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """What one rate and one seed gave."""

    lr: float
    seed: int
    train_loss: float
    """Mean over the last epoch's steps and all before."""
    seconds: float
    """Of training and scoring."""
    scores: dict[str, Scores]
    """Metric to value, by split."""


class Bench:
    """A task that is encoded once and trained on many times."""

    def __init__(self, start: Start, task: TaskFile, splits: Splits, folder: Path) -> None:
        """Encode every split.

        Args:
            folder: where the Trainer may write; it does so only if asked.
        Raises:
            DataError: a row cannot be encoded.
        """
        self.start, self.task, self.splits, self.folder = start, task, splits, folder
        self.max_tokens = task.protocol.max_tokens or start.max_tokens
        self.train = self._encode(splits.train)
        self.scored = {name: self._encode(examples) for name, examples in splits.scored().items()}

    def run(self, *, lr: float, seed: int, show_progress: bool = False) -> tuple[Outcome, PreTrainedModel]:
        """Train from the start's weights under a new head and score every split.

        Raises:
            ModelError: the model cannot be built.
            TrainingError: the loss or the outputs are not finite.
        """
        began = time.monotonic()
        model = build_model(self.start, self.task.task.kind, labels=self.splits.labels, seed=seed)
        trainer = self._trainer(model, lr=lr, seed=seed, show_progress=show_progress)
        loss = float(trainer.train().training_loss)
        if not math.isfinite(loss):
            raise self._diverged(lr, seed, f"the mean loss is {loss}")
        scores = {name: self._score(trainer, name, lr=lr, seed=seed) for name in self.scored}
        return Outcome(lr, seed, loss, time.monotonic() - began, scores), model

    def baseline(self) -> dict[str, Scores]:
        """Scores without learning: of the most frequent label, tag or mean number, or of the model as it is."""
        if isinstance(self.task.task, Instructions):
            model = build_model(self.start, "instructions", labels=(), seed=0)
            trainer = self._trainer(model, lr=1e-5, seed=0, show_progress=False)
            return {name: self._score(trainer, name, lr=0.0, seed=0) for name in self.scored}
        guess: Any = majority(self.splits, self.task.task)
        found = {}
        for name, examples in self.splits.scored().items():
            wanted = [example.answer for example in examples]
            found[name] = self._named(
                _scores_of(self.task.task, [guess] * len(_flat(wanted)), wanted, self.splits.labels)
            )
        return found

    def _encode(self, examples: Sequence[Example]) -> Encoded:
        return encode(examples, self.task.task, self.start, labels=self.splits.labels, max_tokens=self.max_tokens)

    def _trainer(self, model: PreTrainedModel, *, lr: float, seed: int, show_progress: bool) -> Trainer:
        protocol, per_token = self.task.protocol, isinstance(self.task.task, Tokens | Instructions)
        arguments = TrainingArguments(
            output_dir=str(self.folder),
            num_train_epochs=protocol.epochs,
            per_device_train_batch_size=protocol.batch_size,
            per_device_eval_batch_size=2 * protocol.batch_size,
            learning_rate=lr,
            lr_scheduler_type="linear",
            warmup_steps=protocol.warmup_ratio,  # below 1 it is a share of the steps
            weight_decay=protocol.weight_decay,
            bf16=protocol.precision == "bf16",
            use_cpu=not torch.accelerator.is_available(),  # it allows bf16 there only if asked
            seed=seed,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=not show_progress,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # nn.DataParallel would multiply the batch by the number of devices
        collator = (DataCollatorForTokenClassification if per_token else DataCollatorWithPadding)(self.start.tokenizer)
        trainer = Trainer(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=self.train.rows,
            processing_class=self.start.tokenizer,
            preprocess_logits_for_metrics=_REDUCED[type(self.task.task)],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _score(self, trainer: Trainer, split: str, *, lr: float, seed: int) -> Scores:
        encoded = self.scored[split]
        # Rows of like length together, or most of what is computed would be padding.
        order = sorted(range(len(encoded.rows)), key=lambda index: len(encoded.rows[index]["input_ids"]))
        rows_by_length: Any = [encoded.rows[index] for index in order]
        outputs: Any = trainer.predict(rows_by_length).predictions
        if isinstance(outputs, tuple):
            outputs = outputs[0]
        if not _finite(outputs):
            raise self._diverged(lr, seed, "some outputs are not finite")
        if isinstance(self.task.task, Instructions):
            sums = outputs.astype("float64").sum(axis=0)
            return loss_scores(float(sums[0]), int(sums[1]))
        rows = dict(zip(order, outputs, strict=True))
        found: list[Any] = []
        for index in range(len(order)):
            found += _guesses(
                rows[index], self.splits.labels, None if encoded.word_places is None else encoded.word_places[index]
            )
        wanted = [example.answer for example in self.splits.scored()[split]]
        return self._named(_scores_of(self.task.task, found, wanted, self.splits.labels))

    def _named(self, scores: Scores) -> Scores:
        return {name: scores[name] for name in METRICS[self.task.task.kind]}

    def _diverged(self, lr: float, seed: int, what: str) -> TrainingError:
        return TrainingError(
            f"fine-tuning diverged: {what}",
            where=f"lr {lr:g}, seed {seed}",
            remedy="lower protocol.lr, or raise protocol.warmup_ratio",
        )


def _scores_of(asked: Any, found: Sequence[Any], wanted: Sequence[Any], labels: tuple[str, ...]) -> Scores:
    if isinstance(asked, Regression):
        return number_scores(found, wanted)
    return class_scores(found, _flat(wanted), labels=labels)


def _flat(answers: Sequence[Any]) -> list[Any]:
    return [tag for answer in answers for tag in (answer if isinstance(answer, tuple) else (answer,))]


def _guesses(output: Any, labels: tuple[str, ...], places: list[int | None] | None) -> list[Any]:
    """Predictions of one example: a number, a label, or a tag for each word."""
    if places is not None:
        return [None if place is None else labels[int(output[place])] for place in places]
    return [labels[int(output)]] if labels else [float(output)]


def _finite(outputs: Any) -> bool:
    return bool(torch.isfinite(torch.as_tensor(outputs)).all())


def _largest(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    logits_BC: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
    # As floats, so that outputs that are not finite can say so.
    return logits_BC.argmax(-1).float().masked_fill(~logits_BC.isfinite().all(-1), math.nan)


def _number(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    numbers_B: torch.Tensor = (logits[0] if isinstance(logits, tuple) else logits)[:, 0]
    return numbers_B


def _loss_and_count(logits: Any, labels_BT: torch.Tensor) -> torch.Tensor:
    """Summed loss and number of targets of each row, so that no logits are kept."""
    logits_BTV = logits[0] if isinstance(logits, tuple) else logits
    targets_BT = labels_BT[:, 1:]
    losses_BT = F.cross_entropy(
        logits_BTV[:, :-1].transpose(1, 2).float(), targets_BT, ignore_index=IGNORE, reduction="none"
    )
    return torch.stack([losses_BT.sum(1), (targets_BT != IGNORE).sum(1).float()], dim=1)


_REDUCED: Mapping[type[Any], Any] = {
    Classification: _largest,
    Tokens: _largest,
    Regression: _number,
    Instructions: _loss_and_count,
}
