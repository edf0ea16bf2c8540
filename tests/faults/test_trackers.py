"""Trackers that cannot be imported, cannot begin, do not answer: one warning, and training goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from faulty_runs import faulty_run, free_port
from lmssl import checkpoint
from lmssl.recipe.load import load_recipe
from lmssl.train import trackers
from lmssl.train.lines import tracked_answer
from lmssl.train.run import train
from lmssl.train.trackers import Trackers
from runs import metrics, small_recipe, write_recipe

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def run(folder: Path, text: Path) -> None:
    """Three steps with tensorboard."""
    changes = {**{f"model.{key}": value for key, value in SIZES.items()}, "track.with": ["tensorboard"]}
    recipe = small_recipe(text, folder / "run", folder / "cache", steps=3, **changes)
    out = train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))
    assert checkpoint.find_step(out, None).step == 3
    assert [row["step"] for row in metrics(out) if row["kind"] == "train"] == [1, 2, 3]


def warnings_in(said: str) -> list[str]:
    return [line for line in said.splitlines() if "a tracker (" in line]


def test_a_tracker_that_cannot_be_imported(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its package is there, and is broken."""

    def broken(*_: Any) -> None:
        raise ImportError("libprotobuf is of another version")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", broken)
    run(tmp_path, text_folder)
    (line,) = warnings_in(capsys.readouterr().out)
    assert "a tracker (tensorboard) failed, training goes on: it cannot begin: ImportError" in line


def test_a_tracker_whose_server_is_not_there(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("connection refused")

    monkeypatch.setattr(Accelerator, "init_trackers", fail)
    run(tmp_path, text_folder)
    (line,) = warnings_in(capsys.readouterr().out)
    assert "connection refused" in line


def test_a_tracker_that_does_not_answer_costs_seconds_at_the_end(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released = threading.Event()

    def begin(*_: Any, **__: Any) -> None:
        released.wait(600)
        raise ConnectionError("so late that nobody listens")

    monkeypatch.setattr(Accelerator, "init_trackers", begin)
    monkeypatch.setattr(trackers, "_FAREWELL_SECONDS", 0.5)
    monkeypatch.setattr(trackers, "_WAITING_ROWS", 2)
    run(tmp_path, text_folder)
    released.set()
    for thread in threading.enumerate():  # or it would meet what the next test puts in its place
        if thread.name == "trackers":
            thread.join(60)
            assert not thread.is_alive()
    (line,) = warnings_in(capsys.readouterr().out)
    assert "too slow" in line


def test_what_waits_is_sent_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the run, by the thread that began; only numbers."""
    sent: list[tuple[int, dict[str, Any]]] = []
    threads = set()

    def begin(self: Accelerator, name: str, config: dict[str, Any]) -> None:
        threads.add(threading.current_thread().name)
        time.sleep(0.3)

    def log(self: Accelerator, row: dict[str, Any], step: int) -> None:
        threads.add(threading.current_thread().name)
        sent.append((step, row))

    monkeypatch.setattr(Accelerator, "init_trackers", begin)
    monkeypatch.setattr(Accelerator, "log", log)
    said: list[str] = []
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir="unused")
    with Trackers(accelerator, ["tensorboard"], "name", {}, said.append) as found:
        for step in (1, 2):
            found.log({"kind": "train", "step": step, "time": {"mfu": None, "seconds": 2.0}})
    assert sent == [(step, {"step": step, "time/seconds": 2.0}) for step in (1, 2)]
    assert threads == {"trackers"}
    assert said == []


def test_texts_go_to_trackers_that_show_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each to its own; numbers go to all, and a text is no number."""
    sent: dict[str, list[Any]] = {"all": [], "tensorboard": [], "mlflow": []}

    class Tracker:
        def __init__(self, name: str) -> None:
            self.name = name

        def log(self, row: dict[str, Any], step: int) -> None:
            sent[self.name].append((step, row))

        def finish(self) -> None:
            return

    def begin(self: Accelerator, name: str, config: dict[str, Any]) -> None:
        self.trackers = [Tracker("tensorboard"), Tracker("mlflow")]

    monkeypatch.setattr(Accelerator, "init_trackers", begin)
    monkeypatch.setattr(Accelerator, "log", lambda self, row, step: sent["all"].append((step, row)))
    said: list[str] = []
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir="unused")
    with Trackers(accelerator, ["tensorboard"], "name", {}, said.append) as found:
        found.log(tracked_answer({"name": "samples", "step": 3, "metrics": {}, "samples": [{"text": "The end"}]}))
        found.log(tracked_answer({"name": "blimp", "step": 3, "metrics": {"accuracy": 0.5}}))
    assert sent["all"] == [(3, {"step": 3}), (3, {"step": 3, "blimp/accuracy": 0.5})]
    assert sent["tensorboard"] == [(3, {"sample/1": "The end"})]
    assert sent["mlflow"] == said == []


def test_a_tracker_that_accelerate_drops_is_said() -> None:
    said: list[str] = []
    with Trackers(Accelerator(cpu=True), ["wandb"], "name", {}, said.append):
        pass
    assert said == ["a tracker (wandb) failed, training goes on: accelerate does not find its package whole"]


BROKEN = {
    "import": ('raise ImportError("cannot import name wandb_core")\n', "it cannot begin: ImportError"),
    "network": (
        "import socket\ndef init(**_):\n    socket.create_connection(('127.0.0.1', {port}), timeout=5)\n",
        "it cannot begin: ConnectionRefusedError",
    ),
}
"""What wandb is here, and what is said of it."""


@pytest.mark.slow
@pytest.mark.parametrize("how", BROKEN)
def test_a_tracker_that_fails_in_a_process_of_its_own(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A package that pip has installed, and accelerate's own code around it."""
    source, said = BROKEN[how]
    for name in ("wandb", "wandb-0.20.dist-info"):
        (tmp_path / "packages" / name).mkdir(parents=True)
    (tmp_path / "packages/wandb/__init__.py").write_text(source.replace("{port}", str(free_port())), encoding="utf-8")
    about = "Metadata-Version: 2.1\nName: wandb\nVersion: 0.20\n"
    (tmp_path / "packages/wandb-0.20.dist-info/METADATA").write_text(about, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    changes = {**{f"model.{key}": value for key, value in SIZES.items()}, "track.with": ["wandb"]}
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=3, **changes)
    with faulty_run(tmp_path, write_recipe(tmp_path / "recipe.yaml", recipe)) as process:
        assert process.end() == 0, process.output
        (line,) = warnings_in(process.output)
        assert f"a tracker (wandb) failed, training goes on: {said}" in line
    assert checkpoint.find_step(tmp_path / "run", None).step == 3
    assert [row["step"] for row in metrics(tmp_path / "run") if row["kind"] == "train"] == [1, 2, 3]
