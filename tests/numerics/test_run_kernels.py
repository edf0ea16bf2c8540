"""Runs by kernels of our own, spread over processes: they lose what one process loses with torch's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launched_runs import finish, launch
from lmssl.model import native
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
