"""Opens a run: everything that can fail fails here, before the first step and before anything is written."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedConfig

from lmssl import checkpoint
from lmssl.data.ledger import Ledger
from lmssl.data.order import end_position, kept_position, skipped_before
from lmssl.data.stream import SequenceStream
from lmssl.errors import CheckpointError, TrainingError
from lmssl.evaluate.samples import KINDS, prompted
from lmssl.evaluate.subject import recipe_reader
from lmssl.evaluate.suite import load_suite, prepare_suite
from lmssl.model import native
from lmssl.model.build import build_recipe_model
from lmssl.model.continued import begin, recipe_config
from lmssl.model.layers import recompute_layers
from lmssl.objective.build import build_objective
from lmssl.objective.module import LossModule
from lmssl.optim.groups import build_optimizer
from lmssl.recipe.load import resolved_yaml
from lmssl.recipe.objective import seps_per_segment
from lmssl.recipe.sections import Recipe
from lmssl.shipped import find
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.train.backend import Backend, Replicated
from lmssl.train.branch import branch_point
from lmssl.train.changes import Continuation, check_fields, find_continuation, set_passed_aside
from lmssl.train.console import Report
from lmssl.train.fully_sharded import FullySharded
from lmssl.train.guard import merged
from lmssl.train.launch import (
    CompileMode,
    check_trackers,
    choose_compile,
    compile_module,
    keep_memory,
    kernels_pay,
    launched_rank,
    load_kernels,
    may_use_kernels,
    open_accelerator,
    set_determinism,
    with_precision,
)
from lmssl.train.launcher import same_on_all_ranks
from lmssl.train.lock import RunLock, is_lock_file
from lmssl.train.precision import LossScale, check_precision, require_float32, use_fp8
from lmssl.train.saving import open_saver
from lmssl.train.session import Asked, Samples, Session
from lmssl.train.set_aside import SetAside
from lmssl.train.state import TrainState
from lmssl.train.zero import Zero


def open_session(
    recipe: Recipe, report: Report, *, lock: RunLock, rollbacks: Sequence[dict[str, Any]] | None = None
) -> Session:
    """Check, build, and continue from the newest valid checkpoint where there is one.

    Args:
        lock: of the run's folder; taken here by the main process, and given back by the caller.
        rollbacks: of the run so far, where it goes on after one; None: those that the checkpoint knows of.

    Raises:
        LmsslError: whatever is wrong with recipe, run folder, tokenizer, data, model or launch.
    """
    keep_memory()
    run = Path(recipe.out_path)
    recipe = with_precision(recipe)
    check_trackers(recipe)
    _check_run_folder(run, recipe)
    _lock(lock, run, report)
    tokenizer = load_tokenizer(find(recipe.tokenizer.path))
    continuation = find_continuation(run, recipe, report)
    if continuation.found is None:
        continuation = Continuation(branch_point(recipe))
    found = continuation.found
    state = _state_of(found, rollbacks)
    recipe = _without_rolled_back(recipe, state)
    saved = None if found is None else found.text("config.json")
    config = recipe_config(recipe, tokenizer, saved=saved, choose=_chosen_step)
    # Before the text is opened, which may mean tokenizing some of it.
    objective = build_objective(recipe, tokenizer, num_positions=end_position(recipe.batches, recipe.data.skip))
    asked = _open_asked(recipe, config, tokenizer)
    _apply_skip(state, recipe, found, report)
    stream = _open_stream(recipe, tokenizer, found, state, report)
    # The model exists before any backend does: a plugin that shards at construction would change its first weights.
    model = build_recipe_model(recipe, config, draw=found is None)
    begun_with = None if found is not None else begin(model, recipe, tokenizer, report, choose=_chosen_step)
    precision = recipe.train.precision
    core = LossModule(model, objective, bf16=precision in ("bf16", "fp8"), fp16=precision == "fp16")
    accelerator = open_accelerator(recipe, run)
    set_determinism(recipe, accelerator.device)
    kind = backend_class(accelerator, recipe)
    check_precision(precision, accelerator.device, kind.__name__)
    _change_layers(core, recipe, report)
    left = recipe.batches.total_tokens - state.tokens_seen
    compiled = _make_fast(core, kind, recipe, accelerator.device, left, report)
    backend = _open_backend(kind, core, accelerator, recipe, found)
    if precision == "fp16":
        backend.loss_scale = LossScale(accelerator.device, saved=state.loss_scale)
    if found is not None:
        origin = found.path.parent.parent
        report(f"continuing {origin} from step {found.step}{'' if origin == run else f' in {run}'}")
    set_aside = SetAside(run, stream, _read_positions(state, recipe))
    saver = open_saver(run, recipe, tokenizer, backend, report, step=state.step, begun_with=begun_with)
    session = Session(recipe, run, config, stream, objective, backend, state, compiled, report, set_aside, saver, asked)
    _open_run_folder(session, tokenizer, continuation, begun_with, lock)
    session.restore_rope_theta()
    return session


def _state_of(found: checkpoint.Checkpoint | None, rollbacks: Sequence[dict[str, Any]] | None) -> TrainState:
    """Where the run goes on; of a checkpoint that it went back to, what has happened since."""
    state = TrainState() if found is None else TrainState.from_json(found.text("state.json"))
    if rollbacks is not None:
        state.rollbacks = list(rollbacks)
    return state


def _open_asked(recipe: Recipe, config: PreTrainedConfig, tokenizer: Tokenizer) -> Asked:
    """What the recipe asks the model beside its validation text."""
    section, reader = recipe.evaluate, recipe_reader(recipe, config, tokenizer)
    evaluations = () if section.suite is None else load_suite(find(section.suite)).evaluations
    samples = None
    if section.samples is not None:
        kind = KINDS[recipe.objective.kind]
        prompts = [prompted(kind, reader, prompt) for prompt in section.samples.prompts or ()]
        samples = Samples(section.samples, kind, reader, prompts)
    return Asked(evaluations, prepare_suite(evaluations, reader), samples)


def _lock(lock: RunLock, run: Path, report: Report) -> None:
    """Take the lock of a folder that exists, from the main process."""
    if run.exists() and launched_rank() == 0:
        said = lock.acquire()
        if said is not None:
            report(said)


def _without_rolled_back(recipe: Recipe, state: TrainState) -> Recipe:
    """The recipe that leaves out what the run has left out when it went back."""
    left_out = [(rollback["skip"][0], rollback["skip"][1]) for rollback in state.rollbacks]
    if not left_out:
        return recipe
    data = recipe.data.model_copy(update={"skip": merged(recipe.data.skip, left_out)})
    return recipe.model_copy(update={"data": data})


def _chosen_step(path: Path) -> Path:
    """The checkpoint of another run that a model is continued from: its newest, or the one that is named."""
    if not (path / "manifest.json").is_file():
        newest = same_on_all_ranks(f"step of {path}", lambda: str(checkpoint.find_step(path, None).step), os.environ)
        return checkpoint.find_step(path, int(newest)).path
    problem = checkpoint.validate(path)
    if problem is not None:
        raise CheckpointError(problem, where=str(path), remedy="name another checkpoint, or the run's folder")
    return path


def _change_layers(core: LossModule, recipe: Recipe, report: Report) -> None:
    """What the recipe wants of the layers, before they are compiled or sharded."""
    if recipe.train.precision == "fp8":
        report(f"{use_fp8(core):,} linear layers multiply in 8 bits")
    every = recipe.train.activation_checkpointing
    if every is not None:
        recompute_layers(core, 1 if every == "full" else every)


def _make_fast(
    core: LossModule, kind: type[Backend], recipe: Recipe, device: torch.device, tokens_left: int, report: Report
) -> CompileMode:
    """Give steps kernels of our own and compile them in place, where the recipe, the machine and the backend let us."""
    sizes = {"num_parameters": sum(p.numel() for p in core.parameters()), "tokens_left": tokens_left}
    kernels = core.dtype if kind.kernels and may_use_kernels(recipe, device, core.dtype) else None
    compiled = choose_compile(recipe, device, **sizes, modes=kind.compile_modes, kernels=kernels)
    native.set_aside()  # an earlier run in this process may have had them
    if kernels and (compiled != "off" or kernels_pay(recipe, sizes["num_parameters"], kernels)):
        load_kernels(core, report)
    if recipe.train.kernels == "on" and not native.in_use():
        needed = "Linux on a CPU with AVX2, for bf16 one with AVX-512's instructions for it, and no DeepSpeed"
        report(f"train.kernels: on, but this run has none: they need {needed}")
    compile_module(core, compiled)
    return compiled


def backend_class(accelerator: Accelerator, recipe: Recipe) -> type[Replicated | FullySharded | Zero]:
    """What the launch asks for.

    Raises:
        TrainingError: it cannot drive the recipe's optimiser, or its package is missing.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        return FullySharded
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return Replicated
    if recipe.optim.kind != "adamw":
        raise TrainingError(
            f"DeepSpeed cannot drive {recipe.optim.kind}: it cuts weights into flat pieces, and matrices are no more",
            where="optim.kind, and distributed_type in the launch file",
            remedy="launch DDP (recipes/launch/ddp.yaml) or FSDP2 (recipes/launch/fsdp2.yaml), or use optim.kind=adamw",
        )
    return Zero


def _open_backend(
    kind: type[Replicated | FullySharded | Zero],
    core: LossModule,
    accelerator: Accelerator,
    recipe: Recipe,
    found: checkpoint.Checkpoint | None,
) -> Backend:
    """The backend, with the weights as built, or as a checkpoint has them."""
    copies = kind is Replicated and accelerator.num_processes > 1
    ranks = torch.distributed.group.WORLD if copies else None
    bf16 = recipe.train.precision in ("bf16", "fp8")
    backend = kind(core, accelerator, lambda: build_optimizer(core.model, recipe.optim, ranks=ranks, bf16=bf16))
    if recipe.train.ema_decay is not None:
        backend.keep_average(recipe.train.ema_decay)
    if found is not None:
        averages = None if backend.average is None else found.tensors("ema")
        weights, states = (found.tensors(group) for group in ("model", "optim"))
        backend.load(weights, states, averages, where=str(found.path))
    require_float32(backend.held(), backend.optimizer)
    return backend


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
        if run.exists() and any(not path.name.startswith(".tmp-") and not is_lock_file(path) for path in run.iterdir()):
            raise CheckpointError(
                f"{run} is not empty and is no run folder", where="out", remedy="choose another out, or empty it"
            )
        return
    if checkpoint.step_folders(run):  # a start that saved nothing has nothing that another recipe would spoil
        check_fields(run, recipe)


def _open_run_folder(
    session: Session, tokenizer: Tokenizer, continuation: Continuation, begun_with: str | None, lock: RunLock
) -> None:
    """Create the folder: the resolved recipe, a copy of the tokenizer, a line about this session."""
    run, accelerator = session.run, session.accelerator
    if accelerator.is_main_process:
        try:
            run.mkdir(parents=True, exist_ok=True)
            if not lock.held:
                _lock(lock, session.run, session.report)
                if (run / "recipe.yaml").exists():
                    raise CheckpointError(
                        f"another run has begun in {run} meanwhile", where="out", remedy="choose another out"
                    )
            set_passed_aside(run, continuation.passed)
            # First the recipe, which makes it a run folder; a kill before leaves only what the next start overwrites.
            checkpoint.write_synced(run / ".tmp-recipe.yaml", resolved_yaml(session.recipe))
            (run / ".tmp-recipe.yaml").rename(run / "recipe.yaml")
            _keep_tokenizer(run / "tokenizer", tokenizer, begins=continuation.found is None)
            with (run / "sessions.jsonl").open("a", encoding="utf-8") as file:
                about = _about(session) | ({} if begun_with is None else {"model_from": begun_with})
                file.write(json.dumps(about) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"the run folder cannot be written: {error}", where=str(run), remedy="choose another out"
            ) from error
    accelerator.wait_for_everyone()


def _keep_tokenizer(kept: Path, tokenizer: Tokenizer, *, begins: bool) -> None:
    """A copy for what comes after training; one from a start that saved nothing may be of another tokenizer."""
    if begins and kept.exists() and load_tokenizer(kept).fingerprint != tokenizer.fingerprint:
        shutil.rmtree(kept)
    if not kept.exists():
        partial = kept.with_name(".tmp-tokenizer")
        shutil.copytree(tokenizer.path, partial, dirs_exist_ok=True)
        partial.rename(kept)


def _about(session: Session) -> dict[str, object]:
    device = session.accelerator.device
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "from_step": session.state.step,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": session.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": session.recipe.train.precision,
        "compile": session.compiled,
        "kernels": native.in_use(),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "tokenizers")},
        "python": platform.python_version(),
    }
