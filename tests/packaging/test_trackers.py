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
import json, sys
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore
(file,) = Path("wandb").glob("offline-run-*/run-*.wandb")
store, rows, config = DataStore(), [], {}
store.open_for_scan(str(file))
while (data := store.scan_data()) is not None:
    record = Record.FromString(data)
    for update in (*record.run.config.update, *record.config.update):
        config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
    if record.history.item:
        items = record.history.item
        rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
print(json.dumps({"config": config, "rows": rows}))
""",
    "trackio": """
import json, trackio
(run,) = trackio.Api().runs("small")
print(json.dumps({"config": run.config, "rows": run.history()}, default=str))
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
        rows.setdefault(point.step, {})[name] = point.value
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
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
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
    losses = {row["step"]: row["loss"] for row in told["rows"] if "loss" in row}
    written = [row for row in metrics(tmp_path / "run") if row["kind"] == "train"]
    assert losses == pytest.approx({row["step"]: row["loss"] for row in written})
    assert any(name.startswith("validation") or "/loss" in name for row in told["rows"] for name in row)
