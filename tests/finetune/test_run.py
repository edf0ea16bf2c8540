from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lmssl.errors import TrainingError
from lmssl.finetune.rows import example
from lmssl.finetune.run import Bench
from lmssl.finetune.splits import Splits, labels_of
from lmssl.finetune.start import open_start
from lmssl.finetune.task import TaskFile

Rows = list[dict[str, Any]]


def bench(model: Path, rows: Rows, folder: Path, task: dict[str, Any], **protocol: Any) -> Bench:
    """A third of the rows is for validation."""
    settings = {"epochs": 4, "batch_size": 16, "lr": [1e-2], "seeds": [1], **protocol}
    file = TaskFile.model_validate({"name": "t", "task": task, "data": {"train": "x"}, "protocol": settings})
    examples = [example(row, file.task, f"row {number}") for number, row in enumerate(rows)]
    cut = len(examples) * 2 // 3
    labels = labels_of(examples) if task["kind"] in ("classification", "tokens") else ()
    return Bench(open_start(str(model)), file, Splits(examples[:cut], examples[cut:], None, labels), folder)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_texts_are_told_apart(family: str, labelled: Rows, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = bench(request.getfixturevalue(family), labelled, tmp_path, {"kind": "classification"})
    outcome, model = found.run(lr=1e-2, seed=1)
    assert outcome.scores["validation"]["accuracy"] > 0.9
    assert found.baseline()["validation"]["accuracy"] == pytest.approx(0.5)
    assert model.config.id2label == {0: "0", 1: "1"}
    assert list(tmp_path.iterdir()) == []


def test_half_precision(bert: Path, labelled: Rows, tmp_path: Path) -> None:
    outcome, model = bench(bert, labelled, tmp_path, {"kind": "classification"}, precision="bf16").run(lr=1e-2, seed=1)
    assert outcome.scores["validation"]["accuracy"] > 0.9
    assert model.dtype == torch.float32
    exact, _ = bench(bert, labelled, tmp_path, {"kind": "classification"}).run(lr=1e-2, seed=1)
    assert outcome.train_loss != exact.train_loss


def test_the_same_seed_gives_the_same_scores(bert: Path, labelled: Rows, tmp_path: Path) -> None:
    found = bench(bert, labelled, tmp_path, {"kind": "classification"}, epochs=1)
    one, same, other = (found.run(lr=2e-3, seed=seed)[0] for seed in (1, 1, 2))
    assert (one.scores, one.train_loss) == (same.scores, same.train_loss)
    assert one.train_loss != other.train_loss


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_words_are_tagged(family: str, tagged: Rows, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = bench(request.getfixturevalue(family), tagged, tmp_path, {"kind": "tokens"})
    outcome, _ = found.run(lr=1e-2, seed=1)
    assert outcome.scores["validation"]["accuracy"] > 0.95
    assert 0.4 < found.baseline()["validation"]["accuracy"] < 0.65


def test_words_out_of_reach_are_wrong(bert: Path, tagged: Rows, tmp_path: Path) -> None:
    found = bench(bert, tagged, tmp_path, {"kind": "tokens"}, max_tokens=5)  # [CLS], three of six words, [SEP]
    outcome, _ = found.run(lr=1e-2, seed=1)
    assert found.scored["validation"].num_cut == len(found.splits.validation)
    assert 0.4 < outcome.scores["validation"]["accuracy"] <= 0.5


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_numbers_are_predicted(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    draw = random.Random(2)
    rows = []
    for _ in range(120):
        words = [draw.choice(("red", "blue")) for _ in range(8)]
        rows.append({"text": " ".join(words), "label": words.count("red") / 8})
    found = bench(request.getfixturevalue(family), rows, tmp_path, {"kind": "regression"}, epochs=8)
    outcome, _ = found.run(lr=1e-2, seed=1)
    assert outcome.scores["validation"]["pearson"] > 0.8
    assert found.baseline()["validation"] == {"pearson": 0.0, "spearman": 0.0}


def test_answers_are_learned_and_their_loss_is_exact(llama: Path, tmp_path: Path) -> None:
    draw = random.Random(3)
    rows = [{"prompt": f"Say {w}" + "!" * draw.randint(1, 9), "completion": f" {w}"} for w in ("red", "blue") * 30]
    found = bench(llama, rows, tmp_path, {"kind": "instructions"}, epochs=25)
    before = found.baseline()["validation"]
    model, total, count = AutoModelForCausalLM.from_pretrained(llama).eval(), 0.0, 0
    for row in found.scored["validation"].rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    assert before["loss"] == pytest.approx(total / count, rel=1e-5)
    assert before["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    outcome, _ = found.run(lr=1e-2, seed=1)
    assert outcome.scores["validation"]["loss"] < 1.0 < before["loss"]


def test_a_pair_is_compared(bert: Path, tmp_path: Path) -> None:
    """Which of the two texts is about colours: a model that mixes the two up cannot say."""
    draw = random.Random(4)
    rows = []
    for number in range(120):
        colours, code = (" ".join(draw.choices(words, k=4)) for words in (("red", "blue"), ("if", "while")))
        rows.append({"a": colours if number % 2 else code, "b": code if number % 2 else colours, "label": number % 2})
    asked = {"kind": "classification", "text": "a", "pair": "b"}
    outcome, _ = bench(bert, rows, tmp_path, asked, epochs=8).run(lr=1e-2, seed=1)
    assert outcome.scores["validation"]["accuracy"] > 0.9


def test_divergence_is_an_error(bert: Path, labelled: Rows, tmp_path: Path) -> None:
    found = bench(bert, labelled, tmp_path, {"kind": "classification"})
    with pytest.raises(TrainingError, match=r"(?s)diverged.*lr 1e\+38, seed 1"):
        found.run(lr=1e38, seed=1)
