"""Whole runs with Muon: interrupted, with a momentum that warms up; rates in metrics right after resuming."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lmssl import checkpoint
from lmssl.optim.schedule import lr_ratio
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, tensors_of, write_recipe

MUON = {
    "optim": {
        "kind": "muon",
        "lr": 1e-2,
        "adamw_lr": 3e-3,
        "momentum_warmup": {"from_momentum": 0.8, "tokens": 6 * 1024},
    },
    "checkpoint": {"every_steps": 3, "keep_last": 9},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    recipe = small_recipe(text_folder, folder / "run", folder / "cache", steps=7, **MUON)
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


def test_it_learns_and_keeps_one_state_of_matrices(run: Path) -> None:
    losses = [row["loss"] for row in metrics(run) if row["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.3
    states = tensors_of(checkpoint.find_step(run, None), "optim")
    assert "momentum/model.layers.0.mlp.up_proj.weight" in states
    assert "exp_avg/model.layers.0.mlp.up_proj.weight" not in states
    assert "exp_avg_sq/model.embed_tokens.weight" in states


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(run: Path) -> None:
    whole = checkpoint.find_step(run, None)
    expected = {group: dict(tensors_of(whole, group)) for group in ("model", "optim")}
    rows = metrics(run)
    shutil.rmtree(whole.path)
    shutil.rmtree(checkpoint.find_step(run, 6).path)
    train(load_recipe(run.parent / "recipe.yaml"))
    again = checkpoint.find_step(run, None)
    assert again.step == 7
    for group, tensors in expected.items():
        found = tensors_of(again, group)
        assert found.keys() == tensors.keys()
        assert all(found[name].equal(tensor) for name, tensor in tensors.items())
    for key in ("loss", "lr"):
        assert [row.get(key) for row in metrics(run)] == [row.get(key) for row in rows]


def test_the_rate_of_every_step_is_that_of_its_tokens(run: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml").recipe
    for row in metrics(run):
        if row["kind"] == "train":
            ratio = lr_ratio(recipe.schedule, tokens_seen=row["tokens"] - 1024, total_tokens=7 * 1024)
            assert row["lr"] == 1e-2 * ratio
