"""lm-eval's own tasks run offline on local files, in a process of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmssl.errors import EvaluationError
from lmssl.evaluate.harness import run_harness
from lmssl.evaluate.subject import open_subject
from lmssl.recipe.suite import HarnessEvaluation
from runs import write_lines

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [
    {"question": "A statement is", "choices": ["executed", "a sequence of names"], "answer": 0},
    {"question": "A name", "choices": ["was", "is bound"], "answer": 1},
    {"question": "It is the", "choices": ["second", "first suite of a loop"], "answer": 1},
]


def run(command: list[str], cwd: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "home"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@needs_lm_eval
def test_a_local_task_of_lm_eval(folder: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(file=file), encoding="utf-8")
    (tmp_path / "suite.yaml").write_text(
        """evaluations:
  - {name: harness, kind: lm_eval, tasks: [tiny_choice], include_path: tasks}
  - {name: ours, kind: multiple_choice, path: questions.jsonl}
""",
        encoding="utf-8",
    )
    path = folder("llama")
    run([sys.executable, "-m", "lmssl", "eval", str(path), "--suite", "suite.yaml", "--out", "out.jsonl"], tmp_path)
    harness, ours = rows(tmp_path / "out.jsonl")
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    right = 0
    for question in QUESTIONS:
        context, sums = tokenizer(question["question"])["input_ids"], []
        for choice in question["choices"]:
            ids = tokenizer(f"{question['question']} {choice}")["input_ids"]
            with torch.no_grad():
                logits = stock(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(context), len(ids))))
        right += max(range(2), key=sums.__getitem__) == question["answer"]
    assert harness["metrics"]["tiny_choice/acc"] == pytest.approx(right / len(QUESTIONS))
    assert ours["metrics"]["accuracy"] == pytest.approx(right / len(QUESTIONS))
    assert harness["parts"]["tiny_choice"]["acc"] == harness["metrics"]["tiny_choice/acc"]


@pytest.mark.slow
@needs_lm_eval
def test_an_unknown_task_is_named(folder: Any, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(
        "evaluations: [{name: harness, kind: lm_eval, tasks: [no_such_task]}]\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "lmssl", "eval", str(folder("llama")), "--suite", "suite.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 10
    assert "lm-eval knows no task 'no_such_task'" in done.stderr


def test_only_causal_models_are_asked(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    section = HarnessEvaluation.model_validate({"name": "h", "kind": "lm_eval", "tasks": ["t"]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(EvaluationError, match="lm-eval is not installed"):
        run_harness(section, open_subject(folder("llama")), batch_rows=1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    with pytest.raises(EvaluationError, match="lm-eval scores causal models, and this bert is none"):
        run_harness(section, open_subject(folder("bert")), batch_rows=1)
