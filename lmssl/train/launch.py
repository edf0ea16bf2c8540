"""Where a run executes: devices, processes, compilation; the launcher's environment is read here and nowhere below."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
from torch import nn

from lmssl.errors import TrainingError
from lmssl.recipe.sections import Recipe

COMPILE_PAYS_FLOPS_PER_THREAD = 1e13
"""Training FLOPs per CPU thread from which compiling (20 to 60 s) is repaid; see docs/performance.md."""
COMPILE_PAYS_FLOPS_DEVICE = 1e16
"""The same for an accelerator."""

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


def open_accelerator(recipe: Recipe, run: Path) -> Accelerator:
    """An Accelerator that only places, wraps and reduces: precision, accumulation and schedule are ours.

    Raises:
        TrainingError: several processes without distribution, a backend this version does not drive, or a launch
            file that contradicts the recipe.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", {"bf16": "bf16", "fp32": "no"}[recipe.train.precision]):
        raise TrainingError(
            f"the launch file says mixed_precision: {asked}, the recipe train.precision: {recipe.train.precision}",
            where="accelerate config",
            remedy="set mixed_precision: no in the launch file; recipes decide precision",
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=list(recipe.track.trackers) or None,
        project_dir=str(run),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.num_processes != world_size:
        raise TrainingError(
            f"the launcher started {world_size} processes, but accelerate sees {accelerator.num_processes}: "
            "they would train apart and write the same folder",
            where="launch",
            remedy="on CPU set ACCELERATE_USE_CPU=true and launch with --multi_gpu, or use torchrun",
        )
    supported = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in supported:
        raise TrainingError(
            f"{accelerator.distributed_type.value} is not driven by this version",
            where="accelerate config",
            remedy="launch one process or DDP (recipes/launch/ddp.yaml)",
        )
    return accelerator


def set_determinism(recipe: Recipe, device: torch.device) -> None:
    """Bit-exact repeats where the recipe wants them; on CPU they cost nothing measurable."""
    wanted = recipe.train.deterministic
    enabled = device.type == "cpu" if wanted is None else wanted
    torch.use_deterministic_algorithms(enabled)
    # A debugging aid that costs a pass over memory; torch's stubs do not know the attribute.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def choose_compile(recipe: Recipe, device: torch.device, *, num_parameters: int, tokens_left: int) -> CompileMode:
    """What `train.compile` means for this run on this machine."""
    if recipe.train.compile != "auto":
        return recipe.train.compile
    flops = 6.0 * num_parameters * tokens_left
    if device.type != "cpu":
        return "layers" if flops >= COMPILE_PAYS_FLOPS_DEVICE else "off"
    pays = flops >= COMPILE_PAYS_FLOPS_PER_THREAD * torch.get_num_threads()
    return "model" if pays and can_compile() else "off"


def can_compile() -> bool:
    """Whether torch's CPU compiler finds a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return compiler is not None and headers.exists()


def compile_module(module: nn.Module, mode: CompileMode) -> None:
    """Compile in place, so that parameter names stay those of the stock model."""
    if mode == "model":
        module.compile(dynamic=False)
    elif mode == "layers":
        for stack in _stacks(module):
            for layer in stack:
                layer.compile(dynamic=False)


def _stacks(module: nn.Module) -> list[nn.ModuleList]:
    """The longest list of layers, and others as long: T5 has two, and so has ELECTRA with its generator."""
    named = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList)}
    outer = [part for name, part in named.items() if not any(name.startswith(f"{above}.") for above in named)]
    longest = max(map(len, outer))
    return [stack for stack in outer if len(stack) == longest]
