"""The moving average of weights: its values, steps without an update, resuming, export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lmssl import checkpoint
from lmssl.errors import CheckpointError
from lmssl.export import export_run
from lmssl.optim.ema import WeightAverage, decay_at
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, tensors_of, write_recipe

YES, NO = torch.tensor(1.0), torch.tensor(0.0)


def tied() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    return model


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))


def test_it_is_the_weighted_mean_of_the_weights_so_far() -> None:
    model = tied()
    average = WeightAverage(dict(model.named_parameters()), 0.3)
    assert list(average.averages) == [name for name, _ in model.named_parameters()]
    expected = {name: weight.detach().double().clone() for name, weight in model.named_parameters()}
    for step in range(6):
        moved(model)
        average.update(YES, step=step)
        for name, weight in model.named_parameters():
            decay = min(0.3, (1 + step) / (10 + step))
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach().double()
    for name, found in average.averages.items():
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_it_starts_as_a_copy_that_the_optimiser_does_not_move() -> None:
    model = tied()
    average = WeightAverage(dict(model.named_parameters()), 0.999)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    moved(model)
    assert all(torch.equal(average.averages[name], weight) for name, weight in before.items())


def test_a_step_without_update_leaves_every_bit() -> None:
    model = tied()
    average = WeightAverage(dict(model.named_parameters()), 0.9)
    moved(model)
    average.update(YES, step=0)
    before = {name: found.clone() for name, found in average.averages.items()}
    moved(model)
    average.update(NO, step=1)
    assert all(torch.equal(found, before[name]) for name, found in average.averages.items())
    average.update(YES, step=2)
    assert not any(torch.equal(found, before[name]) for name, found in average.averages.items())


def test_the_warm_start_ends_at_the_decay() -> None:
    assert decay_at(0.99, 0) == 0.1
    assert decay_at(0.99, 889) < 0.99
    assert [decay_at(0.99, step) for step in (891, 10**9)] == [0.99, 0.99]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("ema")
    change = {"train.ema_decay": 0.5, "checkpoint": {"every_steps": 3, "keep_last": 9}}
    recipe = small_recipe(text_folder, folder / "run", folder / "cache", steps=7, **change)
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


def test_an_interrupted_run_ends_with_the_same_averages(run: Path) -> None:
    whole = checkpoint.find_step(run, None)
    expected = {name: tensors_of(whole, name) for name in ("model", "ema")}
    assert expected["model"].keys() == expected["ema"].keys()
    assert not all(tensor.equal(expected["model"][name]) for name, tensor in expected["ema"].items())
    rows = metrics(run)
    shutil.rmtree(whole.path)
    shutil.rmtree(checkpoint.find_step(run, 6).path)
    train(load_recipe(run.parent / "recipe.yaml"))
    again = checkpoint.find_step(run, None)
    assert again.step == 7
    for file, tensors in expected.items():
        found = tensors_of(again, file)
        assert all(found[name].equal(tensor) for name, tensor in tensors.items())
    assert [row.get("loss") for row in metrics(run)] == [row.get("loss") for row in rows]


def test_averaging_changes_nothing_in_training(run: Path, tmp_path: Path, text_folder: Path) -> None:
    plain = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=7)
    other = train(load_recipe(write_recipe(tmp_path / "recipe.yaml", plain)))
    found = checkpoint.find_step(other, None)
    weights = tensors_of(checkpoint.find_step(run, None), "model.safetensors")
    assert all(tensor.equal(weights[name]) for name, tensor in tensors_of(found, "model.safetensors").items())
    assert not (found.path / "ema.safetensors").exists()
    with pytest.raises(CheckpointError, match="kept no moving average.*\n.*\n.*without --ema"):
        export_run(other, None, tmp_path / "out", lambda _: None, ema=True)


def test_averages_are_exported_on_request(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export_run(run, None, tmp_path / "out", lambda _: None, ema=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    averages = tensors_of(checkpoint.find_step(run, None), "ema")
    assert all(torch.equal(averages[name], weight) for name, weight in model.named_parameters())
    assert "moving average over training steps (decay 0.5)" in (tmp_path / "out" / "README.md").read_text()


def test_damaged_averages_make_no_checkpoint(run: Path) -> None:
    path = checkpoint.find_step(run, 3).path
    content = bytearray((path / "ema.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "ema.safetensors").write_bytes(content)
    assert checkpoint.validate(path) == "ema.safetensors does not match its checksum"
