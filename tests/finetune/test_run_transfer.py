"""Self-supervised learning in small: what unlabelled text tells of words that no labelled row ever showed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lmssl.export import export_run
from lmssl.finetune.rows import Example
from lmssl.finetune.run import Bench
from lmssl.finetune.splits import Splits
from lmssl.finetune.start import open_start
from lmssl.finetune.task import TaskFile
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import small_recipe, write_recipe

NUM_WORDS, NUM_SHOWN, NUM_LABELLED = 24, 8, 16
"""Words of a topic; those of them that labelled rows use; labelled rows."""


def topics(root: Path) -> tuple[list[str], list[str]]:
    """Two lists of English words that have nothing in common but the texts they will stand in."""
    vocabulary = json.loads((root / "tokenizer/wordpiece-8k/tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 4)
    chosen = random.Random(0).sample(words, 2 * NUM_WORDS)
    return chosen[:NUM_WORDS], chosen[NUM_WORDS:]


def texts(words: list[str], count: int, *, seed: int, length: int = 10) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=length)) for _ in range(count)]


@pytest.fixture(scope="module")
def pretrained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that has read texts of either topic, never told which."""
    folder = tmp_path_factory.mktemp("transfer")
    lines = [text for seed, words in enumerate(topics(root)) for text in texts(words, 1500, seed=seed)]
    (folder / "text").mkdir()
    (folder / "text/all.txt").write_text("\n\n".join(lines), encoding="utf-8")
    changes: dict[str, Any] = {
        "tokenizer": {"path": "tokenizer/wordpiece-8k"},
        "objective": {"kind": "masked", "rate": 0.3},
        "model": {
            "kind": "bert",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "train.batch_tokens": 2048,
        "train.micro_batch_sequences": 32,
        "train.tokens": 2048 * 100,
        "train.log_every_steps": 100,
        "data.validation": None,
    }
    recipe = small_recipe(folder / "text", folder / "run", folder / "cache", steps=100, **changes)
    run = train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))
    return export_run(run, None, folder / "export", report=lambda _: None).path


def test_a_pretrained_model_knows_words_that_were_never_labelled(pretrained: Path, root: Path, tmp_path: Path) -> None:
    shown = [words[:NUM_SHOWN] for words in topics(root)]
    unseen = [words[NUM_SHOWN:] for words in topics(root)]
    train_rows = [Example(t, str(n), "") for n in (0, 1) for t in texts(shown[n], NUM_LABELLED // 2, seed=10 + n)]
    test_rows = [Example(t, str(n), "") for n in (0, 1) for t in texts(unseen[n], 100, seed=20 + n)]
    protocol = {"epochs": 15, "batch_size": 8, "lr": [5e-4], "seeds": [1, 2, 3]}
    task = TaskFile.model_validate(
        {"name": "topics", "task": {"kind": "classification"}, "data": {"train": "x"}, "protocol": protocol}
    )
    found = {}
    for random_weights in (False, True):
        start = open_start(str(pretrained), random_weights=random_weights)
        bench = Bench(start, task, Splits(train_rows, test_rows, None, ("0", "1")), tmp_path)
        found[random_weights] = [
            bench.run(lr=5e-4, seed=seed)[0].scores["validation"]["accuracy"] for seed in task.protocol.seeds
        ]
    print(found)
    assert min(found[False]) > 0.9
    assert max(found[True]) < 0.75
