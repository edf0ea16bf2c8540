"""Opens a run: everything that can fail fails here, before the first step and before anything is written."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lmssl import checkpoint
from lmssl.data.batch import training_batches, validation_batches
from lmssl.data.ledger import Ledger
from lmssl.data.order import kept_position, skipped_before
from lmssl.data.stream import SequenceStream
from lmssl.data.validation import ValidationSplit
from lmssl.errors import CheckpointError, LmsslError
from lmssl.evaluate.loss import LossResult, evaluate_loss
from lmssl.model.build import build_config, build_recipe_model
from lmssl.model.rope import rope_theta, set_rope_theta
from lmssl.objective.base import MicroBatch, Objective, SumObjective
from lmssl.objective.build import build_objective
from lmssl.objective.module import LossModule
from lmssl.optim.ema import WeightAverage
from lmssl.optim.groups import build_optimizer
from lmssl.recipe.load import difference, load_recipe, resolved_yaml
from lmssl.recipe.objective import seps_per_segment
from lmssl.recipe.sections import Recipe
from lmssl.shipped import find
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.train.console import Report
from lmssl.train.launch import (
    check_trackers,
    choose_compile,
    compile_module,
    keep_memory,
    open_accelerator,
    set_determinism,
)
from lmssl.train.proof import compiled_difference, has_dropout
from lmssl.train.set_aside import SetAside
from lmssl.train.state import TrainState

FREE_FIELDS = (
    *("out", "checkpoint", "evaluate", "track", "data.workers", "data.cache"),
    *("data.skip", "data.stages", "data.validation.sets"),
    *("train.compile", "train.micro_batch_sequences", "train.log_every_steps", "train.max_skipped_steps"),
)
"""Fields that may differ when a run continues: they move neither the order of data nor the update.

What a changed `data.skip` or `data.stages` says of positions that are already read is compared with the checkpoint.
"""


@dataclass
class Session:
    """One execution of a run, from opening to the last step."""

    recipe: Recipe
    run: Path
    accelerator: Accelerator
    config: PreTrainedConfig
    stream: SequenceStream
    objective: Objective
    core: LossModule
    """The module itself: names, weights, evaluation."""
    module: nn.Module
    """The prepared module: what the step calls."""
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    state: TrainState
    compiled: str
    report: Report
    set_aside: SetAside
    proven_shapes: set[tuple[torch.Size, ...]] = field(default_factory=set)
    """Of inputs on which the compiled step was compared with the plain one."""

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
            prepare=self.objective.prepare,
            workers=self.recipe.data.workers,
        )

    def begin_step(self, micro: MicroBatch) -> None:
        """What comes before an update: its stage's settings, and for new shapes a proof of the compiled step."""
        self.follow_stage()
        self.prove_compiled(micro)

    def follow_stage(self) -> None:
        """Give the model the rotary base of the next step's stage, and say what the stage changes."""
        step, plan = self.state.step, self.recipe.batches
        theta = self.recipe.rope_theta(step)
        if theta is not None and theta != rope_theta(self.core.model):
            set_rope_theta(self.core.model, theta)
            self.report(f"from step {step + 1} on, the base of rotary positions is {theta:g}")
        if step and plan.sequence_length(step) != plan.sequence_length(step - 1):
            self.report(f"from step {step + 1} on, sequences have {plan.sequence_length(step)} tokens")

    def prove_compiled(self, micro: MicroBatch) -> None:
        """Where the compiled step on CPU differs from the plain one on a micro-batch, say so and go on without it.

        Shapes that were compared before are not compared again.
        """
        shapes = tuple(tensor.shape for tensor in micro.inputs.values())
        if self.compiled == "off" or self.accelerator.device.type != "cpu" or shapes in self.proven_shapes:
            return
        self.proven_shapes.add(shapes)
        if not isinstance(self.objective, SumObjective) or has_dropout(self.core.model):
            return
        difference = compiled_difference(self.core, micro.inputs, self.objective.weights)
        if difference is not None:
            torch.compiler.set_stance("force_eager")
            self.compiled = "off"
            self.report(
                f"the compiled step is wrong, it has {difference}: going on without compilation; another compiler may "
                "be right, such as CXX=clang++"
            )

    def evaluate(self) -> dict[str, LossResult] | None:
        """Loss on the held-out split and on validation sets, or None where there is none."""
        if self.recipe.data.validation is None or not isinstance(self.objective, SumObjective):
            return None
        sets = self.stream.validation_sets()
        splits = {split.corpus: self._validation_batches(split) for split in (*self.stream.validation(), *sets)}
        apart = {split.corpus for split in sets}
        return evaluate_loss(self.core, self.objective, splits, self.accelerator, apart=apart)

    def _validation_batches(self, split: ValidationSplit) -> Iterator[MicroBatch]:
        return validation_batches(
            split,
            micro_batch_sequences=self.recipe.train.micro_batch_sequences,
            world_size=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            prepare=partial(self.objective.prepare, evaluation=True),
        )

    def save(self) -> None:
        """Write a checkpoint of the present state from the main process, then prune."""
        if self.accelerator.is_main_process:
            self.state.epochs = self.stream.epochs_at(self.state.cursor)
            checkpoint.save(
                self.run,
                self.state.step,
                tensors=self._tensors(),
                texts={
                    "state.json": self.state.to_json(),
                    "ledger.jsonl": self.stream.ledger_at(self.state.cursor).text(),
                    "recipe.yaml": resolved_yaml(self.recipe),
                    "config.json": self.config.to_json_string(use_diff=False),
                },
            )
            checkpoint.prune(self.run, self.recipe.checkpoint.keep_last)
        self.accelerator.wait_for_everyone()

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds of the model, by file."""
        model = self.core.model
        found = {
            "model.safetensors": checkpoint.named_weights(model),
            "optim.safetensors": checkpoint.named_optimizer_state(model, self.optimizer),
        }
        if self.average is not None:
            found[checkpoint.AVERAGES] = {name: tensor.cpu() for name, tensor in self.average.averages.items()}
        return found

    def list_set_aside(self) -> None:
        """Bring the lists of what was left out up to the cursor, from the main process; training never fails on it."""
        if self.accelerator.is_main_process:
            try:
                self.set_aside.write(self.state.cursor)
            except (LmsslError, OSError) as error:
                self.report(f"what was left out of the text cannot be listed, training goes on: {error}")


def open_session(recipe: Recipe, report: Report) -> Session:
    """Check, build, and continue from the newest valid checkpoint where there is one.

    Raises:
        LmsslError: whatever is wrong with recipe, run folder, tokenizer, data, model or launch.
    """
    keep_memory()
    run = Path(recipe.out_path)
    check_trackers(recipe)
    _check_run_folder(run, recipe)
    tokenizer = load_tokenizer(find(recipe.tokenizer.path))
    config = build_config(
        recipe.model,
        vocab_size=recipe.vocab_size(tokenizer.num_tokens),
        sequence_length=recipe.data.longest_sequence,
        tokenizer=tokenizer,
        objective=recipe.objective.kind,
    )
    # Before the text is opened, which may mean tokenizing some of it.
    objective = build_objective(recipe, tokenizer, num_positions=recipe.batches.num_positions)
    found = checkpoint.find_latest(run, report)
    state = TrainState() if found is None else TrainState.from_json(found.text("state.json"))
    _apply_skip(state, recipe, found, report)
    stream = _open_stream(recipe, tokenizer, found, state, report)
    # The model exists before any backend does: a plugin that shards at construction would change its first weights.
    model = build_recipe_model(recipe, config)
    core = LossModule(model, objective, bf16=recipe.train.precision == "bf16")
    accelerator = open_accelerator(recipe, run)
    set_determinism(recipe, accelerator.device)
    if found is not None:
        checkpoint.load_weights(core.model, found.tensors("model.safetensors"), where=str(found.path))
    num_parameters = sum(p.numel() for p in core.parameters())
    left = recipe.batches.total_tokens - state.tokens_seen
    compiled = choose_compile(recipe, accelerator.device, num_parameters=num_parameters, tokens_left=left)
    core.to(accelerator.device)
    compile_module(core, compiled)
    optimizer = build_optimizer(core.model, recipe.optim)
    if found is not None:
        checkpoint.load_optimizer_state(core.model, optimizer, found.tensors("optim.safetensors"))
        report(f"continuing {run} from step {found.step}")
    module = accelerator.prepare_model(core)
    average = _open_average(core, recipe, found)
    session = Session(
        *(recipe, run, accelerator, config, stream, objective, core, module, optimizer, average, state, compiled),
        report,
        set_aside=SetAside(run, stream, _read_positions(state, recipe)),
    )
    _open_run_folder(session, tokenizer)
    return session


def _open_average(core: LossModule, recipe: Recipe, found: checkpoint.Checkpoint | None) -> WeightAverage | None:
    """The average of the weights as they are now, or as the checkpoint has it; None: the recipe wants none."""
    if recipe.train.ema_decay is None:
        return None
    average = WeightAverage(core.model, recipe.train.ema_decay)
    if found is not None:
        average.load(found.tensors(checkpoint.AVERAGES))
    return average


def _apply_skip(state: TrainState, recipe: Recipe, found: checkpoint.Checkpoint | None, report: Report) -> None:
    """Move the cursor to where the recipe's `data.skip` puts it, unless that changes what was already read."""
    skip, read = recipe.data.skip, _read_positions(state, recipe)
    then, now = skipped_before(read, state.skip), skipped_before(read, skip)
    if then != now:
        start, end = next(range_ for range_ in (*now, *then) if range_ not in now or range_ not in then)
        raise CheckpointError(
            f"data.skip changed for positions {start} to {end - 1}, and the run has passed them: its next is {read}",
            where=f"data.skip in {found.path if found else recipe.out_path}",
            remedy=f"begin new ranges at {read} or later and keep those before it, or continue from an earlier "
            "checkpoint by moving newer ones out of the run's folder checkpoints",
        )
    state.skip = skip
    state.cursor = kept_position(recipe.batches.first_position(state.step), skip)
    ahead = [(max(start, read), end) for start, end in skip if end > read]
    if ahead:
        count = sum(end - start for start, end in ahead)
        ranges = ", ".join(f"{start} to {end - 1}" for start, end in ahead)
        report(f"data.skip: {count:,} positions will be left out: {ranges}")


def _read_positions(state: TrainState, recipe: Recipe) -> int:
    """Where the last read position ends; a range skipped right after it has not been passed yet."""
    taken = recipe.batches.first_position(state.step)
    return kept_position(taken - 1, state.skip) + 1 if taken else 0


def _open_stream(
    recipe: Recipe, tokenizer: Tokenizer, found: checkpoint.Checkpoint | None, state: TrainState, report: Report
) -> SequenceStream:
    ledger = None if found is None else Ledger.load(found.path / "ledger.jsonl")
    read_positions = _read_positions(state, recipe)
    stream = SequenceStream.open(
        recipe.data,
        tokenizer,
        seed=recipe.data_seed,
        cache_dir=Path(recipe.data.cache).expanduser(),
        ledger=ledger,
        report=report,
        batches=recipe.batches,
        read_positions=read_positions,
        seps_per_segment=seps_per_segment(recipe.objective),
    )
    stream.require_batch(recipe.batch_sequences)
    return stream


def _check_run_folder(run: Path, recipe: Recipe) -> None:
    """Refuse a folder that cannot be written, is no run folder, or belongs to another recipe."""
    if run.exists() and not run.is_dir():
        raise CheckpointError(f"{run} is a file, not a folder", where="out", remedy="choose another out")
    nearest = next(p for p in (run, *run.absolute().parents) if p.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{run} cannot be written", where=str(nearest), remedy="choose another out, or fix its permissions"
        )
    earlier = run / "recipe.yaml"
    if not earlier.exists():
        if run.exists() and any(not path.name.startswith(".tmp-") for path in run.iterdir()):
            raise CheckpointError(
                f"{run} is not empty and is no run folder", where="out", remedy="choose another out, or empty it"
            )
        return
    changed = [
        (path, old, new)
        for path, old, new in difference(load_recipe(earlier).recipe, recipe)
        if not any(path == free or path.startswith(free + ".") for free in FREE_FIELDS)
    ]
    if changed:
        lines = "".join(f"\n    {path}: {old!r} there, {new!r} now" for path, old, new in changed[:8])
        raise CheckpointError(
            f"the run in {run} was made by another recipe:{lines}",
            where=str(earlier),
            remedy="undo these changes to continue it, or choose another out for a new run",
        )


def _open_run_folder(session: Session, tokenizer: Tokenizer) -> None:
    """Create the folder: the resolved recipe, a copy of the tokenizer, a line about this session."""
    run, accelerator = session.run, session.accelerator
    if accelerator.is_main_process:
        try:
            run.mkdir(parents=True, exist_ok=True)
            # First the recipe, which makes it a run folder; a kill before leaves only what the next start overwrites.
            checkpoint.write_synced(run / ".tmp-recipe.yaml", resolved_yaml(session.recipe))
            (run / ".tmp-recipe.yaml").rename(run / "recipe.yaml")
            if not (run / "tokenizer").exists():
                shutil.copytree(tokenizer.path, run / ".tmp-tokenizer", dirs_exist_ok=True)
                (run / ".tmp-tokenizer").rename(run / "tokenizer")
            with (run / "sessions.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(_about(session)) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"the run folder cannot be written: {error}", where=str(run), remedy="choose another out"
            ) from error
    accelerator.wait_for_everyone()


def _about(session: Session) -> dict[str, object]:
    device = session.accelerator.device
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "from_step": session.state.step,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": session.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "compile": session.compiled,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "tokenizers")},
        "python": platform.python_version(),
    }
