"""wandb without a network, trackio and mlflow as they are installed: what a run told them, each reads back.

Each is installed into a folder that shadows this environment's packages, because their own needs do not all agree with
constraints.txt; torch and the rest stay those of this environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs import metrics, small_recipe, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

READ = {
    "wandb": """
import json
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record
(file,) = Path("wandb").glob("offline-run-*/run-*.wandb")
data, at, held, rows, config = file.read_bytes(), 7, b"", [], {}
name = lambda item: item.key or "/".join(item.nested_key)
while at + 7 <= len(data):  # LevelDB's format of logs: pieces of records in blocks, behind checksum, length and kind
    left = 32768 - at % 32768
    if left < 7:
        at += left
        continue
    size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
    held, at = held + data[at + 7 : at + 7 + size], at + 7 + size
    if kind in (1, 4):  # whole, or the last piece
        record, held = Record.FromString(held), b""
        config |= {name(item): json.loads(item.value_json) for item in record.config.update}
        row = {name(item): json.loads(item.value_json) for item in record.history.item}
        rows += [row | {"step": record.history.step.num}] if row else []
print(json.dumps({"config": config, "rows": rows}))
""",
    "trackio": """
import json, sqlite3, trackio
(run,) = trackio.Api().runs("small")
found = sqlite3.connect("store/small.db").execute("select metrics, step from metrics")
rows = [json.loads(metrics) | {"step": step} for metrics, step in found]
print(json.dumps({"config": run.config, "rows": rows}))
""",
    "mlflow": """
import json, os
from mlflow.tracking import MlflowClient
client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
(experiment,) = [e for e in client.search_experiments() if e.name == "small"]
(run,) = client.search_runs([experiment.experiment_id])
rows = {}
for name in run.data.metrics:
    for point in client.get_metric_history(run.info.run_id, name):
        rows.setdefault(point.step, {"step": point.step})[name] = point.value
assert run.info.status == "FINISHED"
print(json.dumps({"config": run.data.params, "rows": list(rows.values())}))
""",
}
"""Prints the settings and the lines of the one run that the working directory's store holds."""
PACKAGES = {"wandb": "wandb==0.31.0", "trackio": "trackio==0.43.0", "mlflow": "mlflow-skinny==3.17.2"}


@pytest.fixture(params=PACKAGES)
def tracker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name, with its package before all others and its store under tmp_path."""
    name: str = request.param
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", tmp_path / "packages", PACKAGES[name]], check=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow's own advice is a server or a database
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    return name


def test_what_a_run_told_a_tracker_is_read_back(tracker: str, tmp_path: Path, text_folder: Path) -> None:
    changes = {"track.with": [tracker], "evaluate.every_steps": 2}
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=4, **changes)
    command = [sys.executable, "-m", "lmssl", "train", str(write_recipe(tmp_path / "recipe.yaml", recipe))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a tracker (" not in done.stdout, done.stdout
    read = subprocess.run(
        [sys.executable, "-c", READ[tracker]], capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ
    )
    assert read.returncode == 0, read.stderr[-3000:]
    told = json.loads(read.stdout.splitlines()[-1])
    assert str(told["config"]["train.batch_tokens"]) == "1024"
    for kind, name in {"train": "loss", "evaluate": "validation_loss"}.items():
        lines = {row["step"]: row["loss"] for row in metrics(tmp_path / "run") if row["kind"] == kind}
        assert {row["step"]: row[name] for row in told["rows"] if name in row} == pytest.approx(lines)
