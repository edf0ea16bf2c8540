from __future__ import annotations

import io
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import pipeline

from lmssl.cli import main
from lmssl.errors import ExportError, TrainingError
from lmssl.finetune.protocol import chosen, default_out, finetune, print_table
from lmssl.finetune.task import TaskFile

Rows = list[dict[str, Any]]
Write = Callable[[str, Rows], Path]


@pytest.fixture
def task(labelled: Rows, write: Write) -> TaskFile:
    data = {"train": str(write("train.jsonl", labelled[:48])), "validation": str(write("dev.jsonl", labelled[48:72]))}
    protocol = {"epochs": 3, "batch_size": 16, "lr": [1e-6, 1e-2], "seeds": [1, 2]}
    return TaskFile.model_validate(
        {
            "name": "colours",
            "task": {"kind": "classification"},
            "data": data | {"test": str(write("test.jsonl", labelled[72:]))},
            "protocol": protocol,
        }
    )


def test_the_protocol_end_to_end(bert: Path, task: TaskFile, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "out"
    results = finetune(str(bert), task, out, report=said.append)
    assert json.loads((out / "results.json").read_text()) == results
    assert [(run["lr"], run["seed"]) for run in results["runs"]] == [(1e-6, 1), (1e-6, 2), (1e-2, 1), (1e-2, 2)]
    assert results["chosen"]["lr"] == 1e-2
    wanted = statistics.median(r["scores"]["test"]["accuracy"] for r in results["runs"][2:])
    assert results["chosen"]["test"]["accuracy"]["median"] == wanted > 0.9
    assert results["baseline"]["test"]["accuracy"] == 0.5
    assert results["num_rows"] == {"train": 48, "validation": 24, "test": 24}
    classify = pipeline("text-classification", model=str(out / "model"), device="cpu")
    assert [found["label"] for found in classify(["red blue green", "while class if"])] == ["0", "1"]
    console = Console(width=200, file=io.StringIO())
    print_table(results, console)
    table = console.file.getvalue()
    assert "majority" in table and "0.01 *" in table and "median of 2 seeds" in table

    # The same command finds everything done; another one does not take the folder.
    said.clear()
    assert finetune(str(bert), task, out, report=said.append) == results
    assert not any(line.startswith("lr ") for line in said)
    with pytest.raises(ExportError, match="another task"):
        finetune(str(bert), task, out, random_weights=True, report=said.append)


def test_an_interrupted_protocol_goes_on(bert: Path, task: TaskFile, tmp_path: Path) -> None:
    whole = finetune(str(bert), task, tmp_path / "whole", report=lambda _: None)
    lines = (tmp_path / "whole/runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/task.json").write_text((tmp_path / "whole/task.json").read_text())
    (tmp_path / "cut/runs.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    said: list[str] = []
    again = finetune(str(bert), task, tmp_path / "cut", report=said.append)
    assert sum(line.startswith("lr ") for line in said) == 1
    assert [run["scores"] for run in again["runs"]] == [run["scores"] for run in whole["runs"]]
    assert len((tmp_path / "cut/runs.jsonl").read_text().splitlines()) == 4


def test_results_are_of_the_weights_and_rows_that_are_there(bert: Path, task: TaskFile, tmp_path: Path) -> None:
    model, out = shutil.copytree(bert, tmp_path / "bert"), tmp_path / "out"
    quick = task.model_copy(update={"protocol": task.protocol.model_copy(update={"lr": (1e-3,), "seeds": (1,)})})

    def again() -> list[str]:
        said: list[str] = []
        finetune(str(model), quick, out, report=said.append)
        return [line for line in said if line.startswith("lr ")]

    assert len(again()) == 1
    (model / "README.md").write_text("a card decides nothing")
    assert again() == []
    rows = Path(task.data.train)
    content = rows.read_text()
    rows.write_text(content.replace("while", "until", 1))
    with pytest.raises(ExportError, match="holds results of other rows, which have changed"):
        again()
    rows.write_text(content)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(ExportError, match="holds results of other weights, which have changed"):
        again()
    assert json.loads((out / "results.json").read_text())["runs"]


def test_the_chosen_rate_has_the_best_median() -> None:
    def run(lr: float, seed: int, score: float) -> dict[str, Any]:
        return {"lr": lr, "seed": seed, "scores": {"validation": {"accuracy": score}}}

    runs = [run(1, 1, 0.5), run(1, 2, 0.99), run(1, 3, 0.6), run(2, 1, 0.7), run(2, 2, 0.65), run(2, 3, 0.1)]
    found = chosen(runs, "accuracy", 0.6)
    assert (found["lr"], found["num_seeds"], found["num_failed"]) == (2, 3, 1)
    assert found["validation"]["accuracy"] == {"median": 0.65, "min": 0.1, "max": 0.7}
    losses = [{"lr": lr, "seed": 1, "scores": {"validation": {"loss": loss}}} for lr, loss in ((1.0, 2.0), (2.0, 1.0))]
    assert chosen(losses, "loss", 3.0)["lr"] == 2.0


def test_several_processes_are_refused(
    bert: Path, task: TaskFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="one process"):
        finetune(str(bert), task, tmp_path / "out")


def test_a_folder_that_is_taken(bert: Path, task: TaskFile, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    with pytest.raises(ExportError, match="holds other files"):
        finetune(str(bert), task, tmp_path / "out", report=lambda _: None)
    (tmp_path / "file").touch()
    with pytest.raises(ExportError):
        finetune(str(bert), task, tmp_path / "file/out", report=lambda _: None)


def test_default_folders() -> None:
    task = TaskFile.model_validate({"name": "t", "task": {"kind": "classification"}, "data": {"train": "x"}})
    assert default_out("runs/gpt-10m/export", task, random_weights=False) == Path("runs/finetune/t-gpt-10m")
    assert default_out("org/model", task, random_weights=True) == Path("runs/finetune/t-model-random")


@pytest.mark.parametrize(
    ("rows", "model", "overrides", "code", "message"),
    [
        ([{"text": "a", "label": 1}] * 9, "bert", ["data.validation_ratio=0.5"], 3, "rows are too few"),
        ([{"text": f"a {n}", "label": 1} for n in range(99)], "bert", [], 3, "same label"),
        ([{"text": "a"}], "bert", [], 3, "do not say what the task is"),
        ([{"text": "a", "label": 1}], "bert", ["protocol.epochs=zero"], 2, "protocol.epochs"),
        ([{"prompt": f"a {n}", "completion": "b"} for n in range(99)], "bert", [], 5, "not trained to continue"),
        ([{"text": f"a {n}", "label": n % 2} for n in range(99)], "nowhere", [], 5, "cannot be read"),
    ],
)
def test_exit_codes(
    rows: Rows,
    model: str,
    overrides: list[str],
    code: int,
    message: str,
    bert: Path,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = write("rows.jsonl", rows), tmp_path / "out"
    name = str(bert) if model == "bert" else model
    assert main(["finetune", name, str(path), *overrides, "--out", str(out)]) == code
    said = capsys.readouterr().err
    assert message in said
    assert "remedy:" in said
    assert not (out / "results.json").exists()
