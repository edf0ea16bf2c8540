from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmssl.errors import DataError, RecipeError
from lmssl.finetune.task import METRICS, TaskFile, implied_task, load_task

WHOLE = """name: sst2
task: {kind: classification, text: sentence}
data: {train: train.tsv, validation: dev.tsv}
protocol: {epochs: 3, lr: [1e-5, 2e-5]}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> TaskFile:
    path = tmp_path / "task.yaml"
    path.write_text(text, encoding="utf-8")
    return load_task(path, overrides)


def test_a_task_file_is_read_and_overridden(tmp_path: Path) -> None:
    task = load(tmp_path, WHOLE, "protocol.seeds=[1, 2]", "metric=matthews")
    assert task.protocol.lr == (1e-5, 2e-5)
    assert task.protocol.seeds == (1, 2)
    assert task.main_metric == "matthews"
    assert load(tmp_path, WHOLE).main_metric == "accuracy"


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        (WHOLE.replace("text: sentence", "txet: sentence"), (), ("no key task.txet", "line 2", "task.text")),
        (WHOLE.replace("classification", "clasification"), (), ("task.kind", "line 2", "classification?")),
        (WHOLE.replace("train: train.tsv, ", ""), (), ("data.train is missing", "line 3")),
        (WHOLE, ("protocol.lr=[]",), ("protocol.lr", "at least 1 item")),
        (WHOLE, ("protocol.seeds=[1, 1]",), ("protocol.seeds: 1 stands there twice",)),
        (WHOLE, ("metric=pearson",), ("not measured of kind classification", "accuracy")),
        (WHOLE, ("protocol.learning_rate=1",), ("no key protocol.learning_rate", "protocol has")),
        ("name: x\n", (), ("task", "data", "missing")),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, overrides: tuple[str, ...], parts: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as error:
        load(tmp_path, text, *overrides)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "optim.lr" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "kind", "names"),
    [
        ({"text": "a", "label": "x"}, "classification", {"text": "text", "pair": None}),
        ({"sentence": "a", "label": 1}, "classification", {"text": "sentence"}),
        ({"premise": "a", "hypothesis": "b", "label": 1}, "classification", {"text": "premise", "pair": "hypothesis"}),
        ({"sentence1": "a", "sentence2": "b", "score": 3.2}, "regression", {"label": "score", "pair": "sentence2"}),
        ({"tokens": ["a"], "pos_tags": ["X"]}, "tokens", {"words": "tokens", "tags": "pos_tags"}),
        ({"prompt": "a", "completion": "b"}, "instructions", {"prompt": "prompt"}),
        ({"messages": []}, "instructions", {"messages": "messages"}),
    ],
)
def test_fields_say_what_a_data_file_asks(row: dict[str, Any], kind: str, names: dict[str, str]) -> None:
    task = implied_task(Path("corpora/mine/train.jsonl"), row)
    assert task.name == "mine-train"
    assert task.task.kind == kind
    assert {name: getattr(task.task, name) for name in names} == names
    assert task.main_metric == METRICS[kind][0]


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(DataError, match="a, b do not say what the task is"):
        implied_task(Path("x.jsonl"), {"a": 1, "b": 2})


def test_overrides_hold_for_a_data_file_too() -> None:
    task = implied_task(Path("x.jsonl"), {"text": "a", "label": 1}, ["protocol.epochs=10", "data.test=y.jsonl"])
    assert (task.protocol.epochs, task.data.test) == (10.0, "y.jsonl")
    with pytest.raises(RecipeError, match="epoch"):
        implied_task(Path("x.jsonl"), {"text": "a", "label": 1}, ["protocol.epoch=10"])
