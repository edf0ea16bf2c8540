"""The demo's own checks; the whole of it runs from an installed wheel in tests/packaging."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from lmssl.demo import free_folder, generate, results, run_demo, unigram_entropy
from lmssl.errors import ExportError, TrainingError
from lmssl.recipe.load import load_recipe
from lmssl.shipped import find
from lmssl.tokenizer.load import load_tokenizer
from runs import small_recipe, write_recipe


def test_a_second_demo_leaves_the_first_alone(tmp_path: Path) -> None:
    assert free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert free_folder(tmp_path / "demo") == tmp_path / "demo-3"


def test_unigram_entropy_is_that_of_the_training_tokens(tmp_path: Path) -> None:
    texts = [f"{word} {word} and the other {word}.\n" * 9 for word in ("one", "two", "three", "four")]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    recipe = small_recipe(tmp_path, tmp_path / "run", tmp_path / "cache")
    recipe["data"]["validation"] = None
    loaded = load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe))
    tokenizer = load_tokenizer(find("tokenizer/bpe-4k"))
    counts: Counter[int] = Counter()
    for text in (tmp_path / "a.txt").read_text(encoding="utf-8").split("\n\n"):
        counts.update([*tokenizer.backend.encode(text.strip("\n")).ids, tokenizer.eos_id])
    total = sum(counts.values())
    expected = -sum(n / total * math.log(n / total) for n in counts.values())
    assert unigram_entropy(loaded) == pytest.approx(expected, rel=0.02)


def test_a_demo_that_did_not_learn_says_so(tmp_path: Path) -> None:
    short = ("train.tokens=4096", "schedule.warmup_tokens=0", f"data.cache={tmp_path / 'cache'}")
    with pytest.raises(TrainingError, match="did not learn"):
        run_demo(tmp_path / "run", short)
    before, after, last = results(tmp_path / "run")
    assert before["step"] == 0 and after["step"] == 2
    assert last == json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-2])["loss"]


def test_a_folder_that_is_no_model_cannot_generate(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="could not generate"):
        generate(tmp_path, "The")
