"""Runs that are asked a suite while they train: the numbers of `lmssl eval`, in lines that survive a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from lmssl.errors import EvaluationError
from lmssl.evaluate.results import FILE, read_rows
from lmssl.evaluate.subject import open_subject
from lmssl.evaluate.suite import evaluate_suite, load_suite, prepare_suite
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, write_lines, write_recipe


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    write_lines(tmp_path / "text.jsonl", [{"text": "The for statement is used to iterate. " * n} for n in range(1, 6)])
    pairs = [{"sentence_good": f"The {n} cats are here.", "sentence_bad": f"The {n} cats is here."} for n in range(9)]
    write_lines(tmp_path / "pairs.jsonl", pairs)
    path = tmp_path / "suite.yaml"
    path.write_text(
        f"""evaluations:
  - {{name: text, kind: loss, corpus: {{name: text, kind: jsonl, path: {tmp_path}/text.jsonl}}, context_tokens: 32}}
  - {{name: pairs, kind: minimal_pairs, path: {tmp_path}/pairs.jsonl}}
""",
        encoding="utf-8",
    )
    return path


def run(folder: Path, text: Path, suite: Path, **changes: Any) -> Path:
    asked = {"evaluate": {"suite": str(suite), "every_steps": 2}, "train.precision": "fp32"}
    recipe = small_recipe(text, folder / "run", text.parent / "suite-cache", **(asked | changes))
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


@pytest.mark.parametrize("validation", [True, False])
def test_a_suite_is_asked_when_the_split_is(tmp_path: Path, text_folder: Path, suite: Path, validation: bool) -> None:
    changes = {} if validation else {"data.validation": None}
    out = run(tmp_path, text_folder, suite, **changes)
    rows = [row for row in metrics(out) if row["kind"] == "suite"]
    assert [(row["step"], row["name"]) for row in rows] == [(n, name) for n in (0, 2, 4) for name in ("text", "pairs")]
    assert [row["step"] for row in metrics(out) if row["kind"] == "evaluate"] == ([0, 2, 4] if validation else [])
    assert rows[0]["metrics"]["loss"] > rows[-2]["metrics"]["loss"] + 0.1
    again = list(read_rows(out / FILE))
    assert [(row["step"], row["metrics"]) for row in again] == [(row["step"], row["metrics"]) for row in rows]
    subject = open_subject(out, step=4)
    questions = prepare_suite(load_suite(suite).evaluations, subject.reader)
    found = evaluate_suite(subject.model, questions, Accelerator(cpu=True), batch_tokens=500)
    assert found is not None
    for row, result in zip(rows[-2:], found, strict=True):
        assert row["metrics"] == pytest.approx(result.metrics, rel=1e-5)


def test_what_a_suite_lacks_is_said_before_anything_is_written(tmp_path: Path, text_folder: Path, suite: Path) -> None:
    write_lines(tmp_path / "pairs.jsonl", [{"sentence_good": "One."}])
    with pytest.raises(EvaluationError, match="sentence_bad"):
        run(tmp_path, text_folder, suite)
    assert not (tmp_path / "run").exists()
