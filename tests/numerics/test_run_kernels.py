"""Runs by kernels of our own, of every objective and spread over processes: they lose what torch's lose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launched_runs import finish, launch
from lmssl.model import native
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, write_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not native.processor_can(), reason="the processor has no AVX2"),
]


def run(
    folder: Path, text: Path, root: Path, file: str, kernels: str, precision: str
) -> tuple[list[Any], list[float], bool]:
    """Losses, gradient norms, and whether there were kernels, of a run that a file of recipes/launch starts."""
    changes = {"train.precision": precision, "train.kernels": kernels, "train.micro_batch_sequences": 4}
    out = folder / f"{file}-{kernels}"
    recipe = write_recipe(out.with_suffix(".yaml"), small_recipe(text, out, folder / "cache", steps=8, **changes))
    if file == "single":
        finish(["-m", "lmssl", "train", str(recipe)])
    else:
        launch(root, file, recipe)
    rows = [row for row in metrics(out) if row["kind"] == "train"]
    session = json.loads((out / "sessions.jsonl").read_text(encoding="utf-8"))
    assert session["processes"] == (1 if file == "single" else 2)
    return [row["loss"] for row in rows], [row["grad_norm"] for row in rows], session["kernels"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_they_lose_what_torch_does_in_one_process(
    tmp_path: Path, text_folder: Path, root: Path, precision: str
) -> None:
    if precision == "bf16" and not native.processor_can(torch.bfloat16):
        pytest.skip("no AVX-512 for bfloat16")
    of_losses, of_norms = (2e-4, 5e-3) if precision == "bf16" else (2e-6, 2e-6)
    single: list[float] = []
    for file, expected in (("single", True), ("ddp", True), ("fsdp2", True), ("zero3", False)):
        losses, norms, without = run(tmp_path, text_folder, root, file, "off", precision)
        single = single or losses
        ours, of_ours, had = run(tmp_path, text_folder, root, file, "on", precision)
        assert (without, had) == (False, expected), file
        assert ours == pytest.approx(single, rel=of_losses), file
        assert of_ours == pytest.approx(norms, rel=of_norms), file  # FSDP2 sums it otherwise, 2e-5 of it


DEBUG = sorted(path.name for path in (Path(__file__).parents[2] / "recipes" / "debug").glob("*.yaml"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's documentation, tokenized once for all recipes."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", DEBUG)
def test_every_objective_loses_the_same(tmp_path: Path, cache: Path, root: Path, name: str) -> None:
    """In float32, as long as rounding has not been multiplied by steps."""
    recipe = root / "recipes" / "debug" / name
    tokens = 4 * load_recipe(recipe).recipe.train.batch_tokens
    found = {}
    for kernels in ("off", "on"):
        changes = {"out": tmp_path / kernels, "data.cache": cache, "data.workers": 0, "evaluate.every_steps": "null"}
        changes |= {"train.tokens": tokens, "train.log_every_steps": 1, "train.precision": "fp32"}
        changes |= {"train.compile": "off", "train.kernels": kernels}
        run = train(load_recipe(recipe, [f"{field}={value}" for field, value in changes.items()]))
        assert json.loads((run / "sessions.jsonl").read_text(encoding="utf-8"))["kernels"] == (kernels == "on")
        found[kernels] = [row for row in metrics(run) if row["kind"] == "train"]
    assert len(found["on"]) == 4
    for ours, theirs in zip(found["on"], found["off"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
