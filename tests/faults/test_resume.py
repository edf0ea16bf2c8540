"""Runs that go on in real processes: from what is whole of their checkpoints, and under what they began with only."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from faulty_runs import faulty_run
from lmssl import checkpoint
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import assert_equal_runs, metrics, small_recipe, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def recipe_of(whole: Path, label: str, /, **changes: Any) -> Path:
    """Six steps, three checkpoints, a tokenizer and text that a test may change."""
    common = {f"model.{key}": value for key, value in SIZES.items()}
    common |= {"checkpoint": {"every_steps": 2, "keep_last": 3}, "data.validation": None, "train.precision": "fp32"}
    common |= {"tokenizer.path": str(whole.parent / "tokenizer")}
    here = whole.parent
    recipe = small_recipe(here / "text", here / label, here / "cache", steps=6, **common | changes)
    return write_recipe(here / f"{label}.yaml", recipe)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text_folder: Path, root: Path) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("resume")
    shutil.copytree(text_folder, folder / "text")
    shutil.copytree(root / "tokenizer/bpe-4k", folder / "tokenizer")
    run = train(load_recipe(recipe_of(folder / "whole", "whole")))
    assert [path.name[-1] for path in checkpoint.step_folders(run)] == ["2", "4", "6"]
    return run


def flip(newest: Path) -> None:
    path = newest / "optim.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(newest: Path) -> None:
    path = newest / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty(newest: Path) -> None:
    (newest / "manifest.json").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "said"),
    [(flip, "optim.safetensors"), (truncate, "model.safetensors"), (empty, "manifest")],
    ids=["flipped bit", "truncated file", "empty manifest"],
)
def test_a_damaged_newest_checkpoint_is_named_and_made_again(
    whole: Path, tmp_path: Path, damage: Any, said: str
) -> None:
    run = shutil.copytree(whole, whole.parent / damage.__name__)
    damage(checkpoint.find_step(run, 6).path)
    with faulty_run(tmp_path, recipe_of(whole, run.name)) as process:
        assert process.end() == 0, process.output
        (line,) = [line for line in process.output.splitlines() if "step-00000006" in line]
        assert said in line
        assert "from step 4" in process.output and "Traceback" not in process.output
    assert_equal_runs(whole, run)


CASES = """
from lmssl.cli import main
for name, change in (("harmless", None), ("field", None), ("tokenizer", "tokenizer"), ("corpus", "text")):
    if change is not None:
        (HERE / change).rename(HERE / f"{change}-before")
        (HERE / f"{change}-changed").rename(HERE / change)
    print("====", name, flush=True)
    code = main(["train", str(HERE / f"{name}.yaml")])
    print(f"---- exit {code}", flush=True)
    if change is not None:
        (HERE / change).rename(HERE / f"{change}-changed")
        (HERE / f"{change}-before").rename(HERE / change)
"""


def files_of(run: Path) -> dict[str, str]:
    """What a run folder holds, by path."""
    paths = (path for path in run.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_what_changed_is_shown_and_refused_or_passes(whole: Path, tmp_path: Path) -> None:
    """Four starts in one process, each on a copy that has lost its last checkpoint; three refusals touch nothing."""
    changes: dict[str, dict[str, Any]] = {
        "harmless": {"name": "other", "train.max_skipped_steps": 3, "data.max_bad_records": 3},
        "field": {"optim.lr": 1e-3, "seed": 7},
        "tokenizer": {},
        "corpus": {},
    }
    here = whole.parent
    for name, change in changes.items():
        run = shutil.copytree(whole, here / name if name != "tokenizer" else here / "tokens")
        shutil.rmtree(checkpoint.find_step(run, 6).path)
        recipe_of(whole, run.name, **change).rename(here / f"{name}.yaml")
    shutil.copytree(here / "text", here / "text-changed")
    part = here / "text-changed" / "part-2.txt"
    part.write_text(part.read_text(encoding="utf-8").replace("the", "thy", 1), encoding="utf-8")
    shutil.copytree(here / "tokenizer", here / "tokenizer-changed")
    content = json.loads((here / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"][-2:] = content["model"]["merges"][:-3:-1]
    (here / "tokenizer-changed/tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    before = {name: files_of(here / name) for name in ("field", "tokens", "corpus")}
    with faulty_run(tmp_path, here / "harmless.yaml", f"HERE = Path({str(here)!r})" + CASES) as process:
        assert process.end() == 0, process.output
        parts = process.output.split("==== ")[1:]
    said = {part.partition("\n")[0]: part for part in parts}
    assert {name: int(part.partition("---- exit ")[2].split()[0]) for name, part in said.items()} == {
        "harmless": 0,
        "field": 6,
        "tokenizer": 3,
        "corpus": 3,
    }
    assert "optim.lr: 0.003 there, 0.001 now" in said["field"] and "seed: 1 there, 7 now" in said["field"]
    assert "tokenizer" in said["tokenizer"].partition("error:")[2]
    assert "the text of corpus 'text' changed" in said["corpus"] and "part-2.txt" in said["corpus"]
    assert "Traceback" not in process.output
    assert {name: files_of(here / name) for name in before} == before
    assert_equal_runs(whole, here / "harmless")
    assert [row["step"] for row in metrics(here / "harmless")] == [1, 2, 3, 4, 5, 6]
