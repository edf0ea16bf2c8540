"""What a launch sets for its process: determinism, garbage collection, what the compiler may do."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lmssl.recipe.load import load_recipe
from lmssl.train.launch import compile_module, frozen_objects, set_determinism
from runs import small_recipe, write_recipe


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    wanted = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(wanted)


@pytest.mark.parametrize(("wanted", "found"), [(True, ":4096:8"), (None, None)])
def test_a_deterministic_run_on_a_gpu_has_what_torch_asks_for(
    wanted: bool | None, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    changes = {} if wanted is None else {"train.deterministic": wanted}
    recipe = small_recipe(tmp_path, tmp_path / "run", tmp_path / "cache", **changes)
    set_determinism(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)).recipe, torch.device("cuda"))
    assert torch.are_deterministic_algorithms_enabled() == bool(wanted)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == found


def test_what_exists_is_left_out_of_garbage_collection() -> None:
    kept = [[] for _ in range(1000)]
    with frozen_objects():
        assert gc.get_freeze_count() >= len(kept)
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize(
    ("mode", "gpu", "stances"), [("off", True, ["force_eager"]), ("layers", True, ["default"]), ("off", False, [])]
)
def test_on_a_gpu_a_run_that_compiles_nothing_compiles_no_loss_either(
    mode: Any, gpu: bool, stances: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.compiler, "set_stance", said.append)
    model = nn.Sequential(nn.ModuleList([nn.Identity()]))
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: None)
    compile_module(model, mode)
    assert said == stances
