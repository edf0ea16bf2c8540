"""recipes/end_to_end in its shrunken form: every step of a model's way, from text to a table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = ("lmssl tokenizer", "lmssl train", "lmssl eval", "lmssl export", "lmssl push", "python -c", "python ")


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_every_step_follows_the_one_before(objective: str, root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "recipes/end_to_end/end_to_end.py"), objective, "--tiny"]
    env = dict(os.environ) | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "COLUMNS": "160"}
    done = subprocess.run(
        [*command, "--work", str(tmp_path / "work")], capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    commands = re.findall(r"^\$ (.*)$", done.stdout, flags=re.M)
    assert len(commands) == len(STEPS) + 2
    assert all(line.startswith(step) for line, step in zip(commands, STEPS, strict=False)), commands
    work = tmp_path / "work"
    ours, theirs = (load_file(work / name / "model.safetensors") for name in ("run/export", "downloaded"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    for name in ("pretrained", "random"):
        results = json.loads((work / name / "results.json").read_text())
        assert results["random_weights"] == (name == "random")
        assert len(results["runs"]) == 2
    assert "downloaded " + ("LlamaForCausalLM" if objective == "causal" else "BertFor") in done.stdout
    assert re.search(r"pretrained weights +[01]\.\d{3}", done.stdout)
