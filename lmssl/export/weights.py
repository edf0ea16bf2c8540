"""The weights that an export holds: trained or averaged, in the numbers that were asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from lmssl import checkpoint
from lmssl.errors import CheckpointError, ExportError
from lmssl.model.build import build_recipe_model
from lmssl.recipe.load import load_recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ExportWeights:
    """Which weights of a run are exported."""

    ema: bool = False
    """The moving average that `train.ema_decay` kept, instead of the weights."""
    average: int = 1
    """The mean of the weights of so many checkpoints, the newest or `step` the last of them."""
    dtype: str = "float32"
    """What the numbers are rounded to."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ExportError(
                f"weights are not written as {self.dtype}", where="--dtype", remedy=f"use one of {', '.join(DTYPES)}"
            )
        if self.average < 1:
            raise ExportError(
                f"a mean of {self.average} checkpoints is none", where="--average", remedy="give 2 or more"
            )
        if self.ema and self.average > 1:
            raise ExportError(
                "the moving average and the mean of checkpoints are two ways to the same end",
                where="--ema and --average",
                remedy="leave one of them out",
            )


def load_model(found: checkpoint.Checkpoint, *, ema: bool = False) -> PreTrainedModel:
    """The model of a checkpoint, in float32 on CPU; with `ema`, of the averages of its weights.

    Raises:
        CheckpointError: averages are wanted and the run kept none.
    """
    recipe = load_recipe(found.path / "recipe.yaml").recipe
    if ema and recipe.train.ema_decay is None:
        raise CheckpointError(
            "the run kept no moving average of its weights",
            where=str(found.path),
            remedy="export without --ema; train.ema_decay=0.999 keeps one in a new run",
        )
    return _model_with(found, found.tensors("ema" if ema else "model"))


def load_chosen(run: Path, found: checkpoint.Checkpoint, weights: ExportWeights) -> PreTrainedModel:
    """The model with the chosen weights, in float32 on CPU and not rounded yet.

    The mean of the last checkpoints is taken in float32, each weight by itself.

    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization"; LAWA (Kaddour
    2022) averages the last checkpoints of a run as this does.

    Raises:
        CheckpointError: too few checkpoints, or no averages.
    """
    if weights.average == 1:
        return load_model(found, ema=weights.ema)
    steps = averaged_steps(run, found, weights)
    total: dict[str, Tensor] = {}
    for step in steps:
        tensors = checkpoint.find_step(run, step).tensors("model")
        if total and tensors.keys() != total.keys():
            raise CheckpointError(
                f"the checkpoint of step {step} has other weights than that of step {steps[0]}",
                where=str(run),
                remedy="average fewer checkpoints",
            )
        for name in tensors:
            tensor = tensors[name].to(torch.float32)
            total[name] = tensor.clone() if name not in total else total[name].add_(tensor)
    return _model_with(found, {name: tensor / len(steps) for name, tensor in total.items()})


def averaged_steps(run: Path, found: checkpoint.Checkpoint, weights: ExportWeights) -> list[int]:
    """Steps whose weights are averaged, in order.

    Raises:
        CheckpointError: there are fewer checkpoints than wanted.
    """
    there = [int(path.name.removeprefix("step-")) for path in checkpoint.step_folders(run)]
    steps = [step for step in there if step <= found.step][-weights.average :]
    if len(steps) < weights.average:
        raise CheckpointError(
            f"a mean of {weights.average} checkpoints is wanted, and up to step {found.step} there are {len(steps)}",
            where=str(run),
            remedy="average fewer, or keep more in the next run with checkpoint.keep_last or keep_every_steps",
        )
    return steps


def round_to(model: PreTrainedModel, dtype: str) -> None:
    """Round every number of a model to a type, in place.

    Raises:
        ExportError: a weight is beyond the type's range.
    """
    torch.nn.Module.to(model, DTYPES[dtype])
    beyond = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if beyond:
        raise ExportError(
            f"{beyond[0]} holds numbers that {dtype} cannot hold, and {len(beyond) - 1} more weights do",
            where="--dtype",
            remedy="use bfloat16, which has the range of float32",
        )


def _model_with(found: checkpoint.Checkpoint, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    config = AutoConfig.for_model(**json.loads(found.text("config.json")))
    model = build_recipe_model(load_recipe(found.path / "recipe.yaml").recipe, config)
    checkpoint.load_weights(model, tensors, where=str(found.path))
    model.eval()
    return model
