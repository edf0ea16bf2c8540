"""The scripts of recipes/finetune, each on the export of a tiny run, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmssl.export import export_run
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import small_recipe, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ONES, ZEROS = ("if", "while", "class", "for"), ("red", "blue", "green", "for")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def exported(folder: Path, text: Path, **changes: Any) -> Path:
    """What `lmssl export` writes of a run of two steps."""
    recipe = small_recipe(text, folder / "run", folder / "cache", steps=2, **changes)
    recipe["model"] |= SIZES
    run = train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))
    return export_run(run, None, folder / "export", lambda _: None).path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    changes = {"tokenizer.path": "tokenizer/wordpiece-8k", "objective": {"kind": "masked"}, "model": {"kind": "bert"}}
    return exported(tmp_path_factory.mktemp("bert"), text_folder, **changes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    return exported(tmp_path_factory.mktemp("llama"), text_folder)


def run(root: Path, folder: Path, script: str, *arguments: str) -> dict[str, Any]:
    """Run a script where nothing of lmssl can be imported; its last line is its result."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_DATASETS_CACHE": str(folder / "cache")}
    command = [sys.executable, "-X", "importtime", str(root / "recipes/finetune" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, check=False)
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "import time" not in line)
    assert "lmssl" not in done.stderr.replace(str(root), "")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def needs(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled(seed: int, count: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {"text": " ".join(draw.choices(ONES if n % 2 else ZEROS, k=8)), "label": ("colour", "code")[n % 2]}
        for n in range(count)
    ]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_classify_with_trainer(family: str, request: pytest.FixtureRequest, root: Path, tmp_path: Path) -> None:
    model = request.getfixturevalue(family)
    data = lines(tmp_path / "a.jsonl", labelled(1, 96)), lines(tmp_path / "b.jsonl", labelled(2, 40))
    found = run(root, tmp_path, "classify_with_trainer.py", str(model), *data, "--lr", "1e-2", "--epochs", "4")
    assert found["accuracy"] > 0.9
    assert json.loads((tmp_path / "classifier/config.json").read_text())["id2label"] == {"0": "code", "1": "colour"}


def test_adapt_with_peft(llama: Path, root: Path, tmp_path: Path) -> None:
    needs("peft")
    before = (llama / "model.safetensors").read_bytes()
    data = lines(tmp_path / "a.jsonl", labelled(1, 96)), lines(tmp_path / "b.jsonl", labelled(2, 40))
    found = run(root, tmp_path, "adapt_with_peft.py", str(llama), *data, "--lr", "1e-2", "--epochs", "8")
    assert found["accuracy"] > 0.9
    assert (llama / "model.safetensors").read_bytes() == before
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()


def test_instruct_with_trl(llama: Path, root: Path, tmp_path: Path) -> None:
    needs("trl")
    chats = [
        {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}]}
        for word in ("red", "blue") * 40
    ]
    arguments = (lines(tmp_path / "chats.jsonl", chats), "--lr", "1e-2", "--epochs", "12")
    found = run(root, tmp_path, "instruct_with_trl.py", str(llama), *arguments)
    assert found["losses"][-1] < 0.7 < found["losses"][0]
    assert found["answer"] == "red"


def test_embed_with_sentence_transformers(bert: Path, root: Path, tmp_path: Path) -> None:
    needs("sentence_transformers")
    draw = random.Random(5)
    words = [f"{a} {b}" for a in ("red", "blue", "green", "old", "new", "small") for b in ("house", "tree", "river")]
    pairs = [
        {"anchor": words[n % 18], "positive": f"see {words[n % 18]} there {draw.choice(words)}"} for n in range(360)
    ]
    arguments = (lines(tmp_path / "pairs.jsonl", pairs), "--lr", "1e-2", "--epochs", "3")
    found = run(root, tmp_path, "embed_with_sentence_transformers.py", str(bert), *arguments)
    assert 0 <= found["before"] <= found["after"] <= 1
    assert found["after"] > 0.2
    assert (tmp_path / "embedder/modules.json").exists()
