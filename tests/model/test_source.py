"""Where a continued model lies: folders, run folders, and names on a Hub that stands in on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hub_stand_in import Commit, HubStandIn, Repository
from lmssl.errors import ModelError
from lmssl.model.flops import num_parameters
from lmssl.model.source import as_section, newest_step, open_source, stand_in
from lmssl.recipe.family import ContinuedModel
from lmssl.recipe.model import FAMILIES, Gpt2Model

CONFIG = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 320}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"code",
    "generator/config.json": b"{}",
}
PROGRAM = """
import json, sys
from lmssl.errors import ModelError
from lmssl.model.source import open_source
from lmssl.recipe.family import ContinuedModel
section = ContinuedModel.model_validate(json.loads(sys.argv[1]))
try:
    found = open_source(section, download=sys.argv[2] == "download")
    print(json.dumps({"path": str(found.path), "commit": found.commit, "kind": found.kind}))
except ModelError as error:
    print(json.dumps({"error": str(error)}))
"""


def section(path: Path | str, **change: Any) -> ContinuedModel:
    return ContinuedModel.model_validate({"from": str(path), **change})


def test_a_name_on_the_hub_gives_a_snapshot_of_config_and_safetensors_alone(tmp_path: Path) -> None:
    """No pickle and no code is fetched; the commit is known; what is in the cache is found without the Hub."""
    stand = HubStandIn()
    oids = ["a" * 40, "b" * 40]
    commits = [Commit(oid, "", FILES | {"note.json": oid.encode()}) for oid in oids]
    stand.repositories["me/tiny"] = Repository(private=False, branches={"main": commits, "old": commits[:1]})

    def ask(value: dict[str, Any], how: str, **environment: str) -> dict[str, Any]:
        command = [sys.executable, "-c", PROGRAM, json.dumps(value), how]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ, **environment}
        )
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    with stand.running() as hub:
        online = hub.environment(str(tmp_path)) | {"HF_HUB_OFFLINE": "0"}
        found = ask({"from": "me/tiny"}, "download", **online)
        assert (found["commit"], found["kind"]) == (oids[1], "gpt2")
        files = {str(path.relative_to(found["path"])) for path in Path(found["path"]).rglob("*") if path.is_file()}
        assert files == {"config.json", "model.safetensors", "generator/config.json", "note.json"}
        old = ask({"from": "me/tiny", "revision": "old"}, "download", **online)
        assert old["commit"] == oids[0] and Path(old["path"], "note.json").read_text() == oids[0]
        missing = ask({"from": "me/other"}, "download", **online)["error"]
        assert "no such model could be had from the Hub" in missing and "model.from = me/other" in missing
        missing = ask({"from": "me/tiny", "revision": "new"}, "download", **online)["error"]
        assert "model.revision = new" in missing
    offline = online | {"HF_HUB_OFFLINE": "1"}
    assert ask({"from": "me/tiny"}, "cached", **offline) == found
    assert "no such model could be had" in ask({"from": "me/other"}, "download", **offline)["error"]


def folder(path: Path, config: dict[str, Any] = CONFIG) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10):
        folder(tmp_path / f"run/checkpoints/step-{step:08d}")
        (tmp_path / f"run/checkpoints/step-{step:08d}/manifest.json").write_text("{}", encoding="utf-8")
    folder(tmp_path / "run/checkpoints/step-00000012")  # a save that was killed
    newest = tmp_path / "run/checkpoints/step-00000010"
    assert newest_step(tmp_path / "run") == newest
    found = open_source(section(tmp_path / "run"))
    assert (found.path, found.tokenizer_path, found.of_run) == (newest, tmp_path / "run/tokenizer", True)
    named = open_source(section(tmp_path / "run/checkpoints/step-00000002"))
    assert named.path.name == "step-00000002" and named.tokenizer_path == tmp_path / "run/tokenizer"
    assert (
        open_source(section(tmp_path / "run"), choose=lambda run: run / "checkpoints/step-00000002").path == named.path
    )
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(ModelError, match="the run has no checkpoint"):
        open_source(section(tmp_path / "empty"))


def test_formulas_take_a_familys_section_for_it(tmp_path: Path) -> None:
    found, why = stand_in(section(folder(tmp_path / "a")))
    assert isinstance(found, Gpt2Model) and why == ""
    built = Gpt2Model(kind="gpt2", n_embd=32, n_layer=2, n_head=2)
    sizes = {"vocab_size": 320, "sequence_length": 64}
    assert num_parameters(found, **sizes) == num_parameters(built, **sizes)
    modern = {
        "model_type": "modernbert",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "rope_parameters": {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 3.0}},
    }
    read: Any = as_section(modern)
    assert isinstance(read, FAMILIES["modernbert"]) and (read.global_rope_theta, read.local_rope_theta) == (5.0, 3.0)


@pytest.mark.parametrize(
    ("config", "why"),
    [({"model_type": "olmo2"}, "no formula for olmo2"), ({"model_type": "gpt2"}, "no formula for gpt2")],
)
def test_what_has_no_formula_stays_as_it_is(tmp_path: Path, config: dict[str, Any], why: str) -> None:
    given = section(folder(tmp_path / "a", config))
    assert stand_in(given) == (given, why)
    gone = section(tmp_path / "nowhere")
    assert stand_in(gone)[0] is gone and "is not here: there is no such folder" in stand_in(gone)[1]
