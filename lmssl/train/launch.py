"""Where a run executes: devices, processes, compilation; the launcher's environment is read here and nowhere below."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, InitProcessGroupKwargs, KwargsHandler
from torch import nn

from lmssl.errors import TrainingError
from lmssl.model import native
from lmssl.model.fused import fuse_layers
from lmssl.model.layers import layer_stacks
from lmssl.recipe.load import load_recipe
from lmssl.recipe.sections import Recipe
from lmssl.train.launcher import require_meeting, same_on_all_ranks
from lmssl.train.precision import bf16_is_faster

COMPILE_PAYS_FLOPS_PER_THREAD = 1e13
"""Training FLOPs per CPU thread from which compiling (20 to 60 s) is repaid; see docs/performance.md."""
COMPILE_PAYS_BESIDE_KERNELS = {torch.bfloat16: 1e14, torch.float32: 4e14}
"""The same where steps are made by kernels of our own, compiled or not, by the type of products."""
KERNELS_PAY_FLOPS_PER_THREAD = {torch.bfloat16: 1e12, torch.float32: 1e13}
"""Training FLOPs per CPU thread from which kernels are built (7 s, once on a machine), by the type of products."""
COMPILE_PAYS_FLOPS_DEVICE = 1e16
"""The same for an accelerator."""

_DRIVEN = (
    *(DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU),
    *(DistributedType.FSDP, DistributedType.DEEPSPEED),
)

CompileMode = Literal["off", "layers", "model"]


def check_trackers(recipe: Recipe) -> None:
    """Refuse a tracker whose package is missing; accelerate would drop it without a word.

    Raises:
        TrainingError: names the package.
    """
    for tracker in recipe.track.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise TrainingError(
                f"the tracker {tracker!r} is not installed",
                where="track.with",
                remedy=f"pip install {tracker}, or take it out of track.with",
            )


def keep_memory() -> None:
    """Let this process keep freed memory, in huge pages where the kernel lends them; a no-op without glibc.

    A training step frees and takes back the same buffers; by default glibc returns every one of 32 MiB and more to the
    kernel, which then maps and clears it again page by page. Call it before the first large tensor exists.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**26)
    mallopt(mmap_max, 0)


def with_precision(recipe: Recipe) -> Recipe:
    """A recipe that says how products are computed, the same on all ranks, where it left that to the device.

    A run that has begun, or that another branches off, goes on as it was; its own recipe says how.
    """
    if recipe.train.precision != "auto":
        return recipe
    precision = same_on_all_ranks(f"precision of {recipe.out_path}", lambda: _precision_of(recipe), os.environ)
    train = recipe.train.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"train": train})


def _precision_of(recipe: Recipe) -> str:
    origins = [recipe.out_path] + ([] if recipe.branch is None else [recipe.branch.run])
    for earlier in (Path(origin) / "recipe.yaml" for origin in origins):
        if earlier.is_file() and (kept := load_recipe(earlier).recipe.train.precision) != "auto":
            return kept
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "y", "on", "t")
    device = None if wants_cpu else torch.accelerator.current_accelerator(check_available=True)
    return "bf16" if bf16_is_faster("cpu" if device is None else device.type) else "fp32"


def open_accelerator(recipe: Recipe, run: Path) -> Accelerator:
    """An Accelerator that only places, wraps and reduces: precision, accumulation and schedule are ours.

    Raises:
        TrainingError: several processes without distribution, a backend this version does not drive, or a launch
            file that contradicts the recipe, or ranks that cannot meet.
    """
    _check_launch_file(recipe)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    # Of one exchange between ranks. The watch over ranks that hang is to lose patience first, for it names them.
    joining = InitProcessGroupKwargs(timeout=timedelta(seconds=(recipe.train.hang_seconds or 604_800) + 300))
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True), joining]
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        _require_deepspeed()
        if not torch.accelerator.is_available():
            joining.backend = "gloo"  # else DeepSpeed wants a library of its own
    require_meeting(os.environ)
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=list(recipe.track.trackers) or None,
        project_dir=str(run),
        kwargs_handlers=handlers,
    )
    if accelerator.num_processes != world_size:
        raise TrainingError(
            f"the launcher started {world_size} processes, but accelerate sees {accelerator.num_processes}: "
            "they would train apart and write the same folder",
            where="launch",
            remedy="on CPU set ACCELERATE_USE_CPU=true and launch with --multi_gpu, or use torchrun",
        )
    if accelerator.distributed_type not in _DRIVEN:
        raise TrainingError(
            f"{accelerator.distributed_type.value} is not driven by this version",
            where="accelerate config",
            remedy="launch one process, DDP, FSDP2 or DeepSpeed (recipes/launch)",
        )
    return accelerator


def _check_launch_file(recipe: Recipe) -> None:
    """Launch files say where, recipes say what: refuse one that speaks of precision, accumulation or compilation."""
    rows = recipe.train.micro_batch_sequences
    same = {"fp32": "no"}.get(recipe.train.precision, recipe.train.precision)
    fields = (
        ("mixed_precision", "MIXED_PRECISION", ("no", same), "train.precision", recipe.train.precision),
        ("dynamo_backend", "DYNAMO_BACKEND", ("no",), "train.compile", recipe.train.compile),
        ("gradient_accumulation_steps", "GRADIENT_ACCUMULATION_STEPS", ("1",), "train.micro_batch_sequences", rows),
    )
    for name, variable, allowed, field, value in fields:
        asked = os.environ.get(f"ACCELERATE_{variable}", allowed[0]).lower()
        if asked not in allowed:
            raise TrainingError(
                f"the launch file says {name}: {asked}, the recipe {field}: {value}",
                where="accelerate config",
                remedy=f"set {name}: {allowed[0]} in the launch file; recipes decide it",
            )


def _require_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise TrainingError(
            "the launch file asks for DeepSpeed, which is not installed",
            where="accelerate config",
            remedy="pip install 'lmssl[deepspeed]', or launch FSDP2 (recipes/launch/fsdp2.yaml)",
        )


def set_determinism(recipe: Recipe, device: torch.device) -> None:
    """Bit-exact repeats where the recipe wants them; on CPU they cost nothing measurable."""
    wanted = recipe.train.deterministic
    enabled = device.type == "cpu" if wanted is None else wanted
    if enabled and device.type == "cuda":  # torch refuses products without it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    # A debugging aid that costs a pass over memory; torch's stubs do not know the attribute.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def choose_compile(
    recipe: Recipe,
    device: torch.device,
    *,
    num_parameters: int,
    tokens_left: int,
    modes: Sequence[str] = ("off", "layers", "model"),
    kernels: torch.dtype | None = None,
) -> CompileMode:
    """What `train.compile` means for this run on this machine.

    Args:
        modes: what the backend can compile.
        kernels: the type of products where steps are made by kernels of our own; None: they are not.
    Raises:
        TrainingError: the recipe wants what the backend cannot compile.
    """
    wanted = recipe.train.compile
    if wanted != "auto":
        if wanted not in modes:
            raise TrainingError(
                f"what shards weights cannot be compiled as train.compile={wanted} wants",
                where="train.compile, and distributed_type in the launch file",
                remedy=f"use {' or '.join(modes)}, or auto",
            )
        return wanted
    flops = 6.0 * num_parameters * tokens_left
    if device.type != "cpu":
        return "layers" if flops >= COMPILE_PAYS_FLOPS_DEVICE and "layers" in modes else "off"
    per_thread = COMPILE_PAYS_BESIDE_KERNELS[kernels] if kernels else COMPILE_PAYS_FLOPS_PER_THREAD
    pays = flops >= per_thread * torch.get_num_threads() and can_compile()
    found: CompileMode = "model" if "model" in modes else "layers" if "layers" in modes else "off"
    return found if pays else "off"


def can_compile() -> bool:
    """Whether torch's CPU compiler finds a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return compiler is not None and headers.exists()


def may_use_kernels(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this processor has what our own kernels need, and the recipe lets them be used.

    Args:
        dtype: of matrix products.
    """
    return device.type == "cpu" and recipe.train.kernels != "off" and native.processor_can(dtype)


def kernels_pay(recipe: Recipe, num_parameters: int, dtype: torch.dtype) -> bool:
    """Whether an uncompiled run is long enough to build them; all of it counts, so that it goes on as it began."""
    flops = 6.0 * num_parameters * recipe.batches.total_tokens
    return recipe.train.kernels == "on" or flops >= KERNELS_PAY_FLOPS_PER_THREAD[dtype] * torch.get_num_threads()


def load_kernels(module: nn.Module, report: Callable[[str], None]) -> None:
    """Let training steps on CPU use our own kernels; where they cannot be built, say so and go on with torch's."""
    compiler, home = os.environ.get("CXX", "g++"), os.environ.get("XDG_CACHE_HOME")
    cache_folder = Path(home) / "lmssl" if home else None
    try:
        if native.processor_can() and not native.library_file(compiler, cache_folder).exists():
            report("building kernels for this processor, once, in about 7 s")
        if native.load(compiler, cache_folder):
            fuse_layers(module)
    except native.BuildError as error:
        report(f"kernels for this processor cannot be built, torch's are used, which are slower: {error}")


def _graph_passes() -> dict[str, Any] | None:
    if not native.in_use():
        return None
    from lmssl.model.tied import JoinTiedGradients  # here, for it imports the compiler

    return {"post_grad_custom_pre_pass": JoinTiedGradients()}


def compile_module(module: nn.Module, mode: CompileMode) -> None:
    """Compile in place, so that parameter names stay those of the stock model."""
    if torch.cuda.is_available():  # where the head's loss is compiled apart, at its first call
        torch.compiler.set_stance("force_eager" if mode == "off" else "default")
    if mode == "model":
        module.compile(dynamic=False, options=_graph_passes())
    elif mode == "layers":
        for stack in layer_stacks(module):
            for layer in stack:
                layer.compile(dynamic=False)


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Leave all that exists by now out of garbage collection, whose pauses grow with what it has to look at."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def launched() -> Iterator[Accelerator]:
    """An Accelerator for work beside training, over all processes that were launched; on CPU where there is no GPU.

    Raises:
        TrainingError: processes that do not know of each other.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.num_processes != num_launched():
        raise TrainingError(
            f"the launcher started {num_launched()} processes, but accelerate sees {accelerator.num_processes}",
            where="launch",
            remedy="launch with torchrun, or accelerate launch --multi_gpu",
        )
    try:
        yield accelerator
    finally:
        if accelerator.num_processes > 1:
            accelerator.end_training()


def num_launched() -> int:
    """Processes that the launcher started, known before there is an Accelerator."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0"))
