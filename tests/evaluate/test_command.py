"""Two launched processes give what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runs import write_lines

pytestmark = pytest.mark.slow


def run(command: list[str], cwd: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "home"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_two_processes_answer_as_one(kind: str, folder: Any, tmp_path: Path) -> None:
    text = "A statement is executed in its suite. " * 20
    write_lines(tmp_path / "text.jsonl", [{"text": text[n:]} for n in range(0, 400, 40)])
    pairs = [{"sentence_good": f"The {n} cats are here.", "sentence_bad": f"The {n} cats is here."} for n in range(15)]
    write_lines(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "suite.yaml").write_text(
        """evaluations:
  - {name: text, kind: loss, corpus: {name: text, kind: jsonl, path: text.jsonl}, context_tokens: 32}
  - {name: pairs, kind: minimal_pairs, path: pairs.jsonl}
""",
        encoding="utf-8",
    )
    asked = ["-m", "lmssl", "eval", str(folder(kind)), "--suite", "suite.yaml", "--batch-tokens", "300", "--out"]
    run([sys.executable, *asked, "one.jsonl"], tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([sys.executable, *launcher, *asked, "two.jsonl"], tmp_path)
    one, two = rows(tmp_path / "one.jsonl"), rows(tmp_path / "two.jsonl")
    assert len(one) == len(two) == 2
    for first, second in zip(one, two, strict=True):
        assert first["metrics"] == second["metrics"]
