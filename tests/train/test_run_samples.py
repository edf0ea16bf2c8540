"""Runs that write texts while they train, in lines that survive a restart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lmssl.errors import EvaluationError, Preempted
from lmssl.evaluate.generate import Sampling, write
from lmssl.evaluate.results import FILE, read_rows
from lmssl.evaluate.subject import open_subject
from lmssl.recipe.load import load_recipe
from lmssl.train.loop import Loop
from lmssl.train.run import train
from lmssl.train.session import Session
from runs import metrics, small_recipe, write_recipe

ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDPIECE = {"tokenizer": {"path": "tokenizer/wordpiece-8k"}}
RUNS: dict[str, dict[str, Any]] = {
    "causal": {},
    "prefix": {"objective": {"kind": "prefix"}},
    "hybrid": WORDPIECE | {"objective": {"kind": "hybrid"}},
    "masked": WORDPIECE | {"objective": {"kind": "masked"}, "model": {"kind": "bert", **ENCODER}},
    "replaced": WORDPIECE
    | {"objective": {"kind": "replaced"}, "model": {"kind": "electra", "embedding_size": 16, **ENCODER}},
    "span": {
        "tokenizer": {"path": "tokenizer/t5-8k"},
        "objective": {"kind": "span"},
        "model": {"kind": "t5", "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2},
    },
}


def run(folder: Path, text: Path, samples: dict[str, Any], **changes: Any) -> Path:
    changes = {"evaluate.every_steps": 2, "evaluate.samples": samples, "train.precision": "fp32"} | changes
    recipe = small_recipe(text, folder / "run", text.parent / "samples-cache", **changes)
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for row in metrics(out) if row.get("evaluation") == "samples"]


@pytest.mark.parametrize("kind", RUNS)
def test_every_objective_writes_from_held_out_text(
    kind: str, tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(tmp_path, text_folder, {"max_new_tokens": 24}, **RUNS[kind])
    rows = rows_of(out)
    assert [row["step"] for row in rows] == [0, 2, 4]
    texts = " ".join(" ".join(path.read_text(encoding="utf-8").split()) for path in text_folder.glob("*.txt"))
    for row in rows:
        assert len(row["samples"]) == 2
        for sample in row["samples"]:
            if kind in ("causal", "prefix", "hybrid"):
                assert sample["text"].startswith(sample["prompt"])
                assert "original" not in sample
            else:
                assert re.search(r"\[MASK\]" if kind != "span" else "<extra_id_0>", sample["prompt"])
                assert "[MASK]" not in sample["text"]
                assert sample["original"]
            if kind in ("causal", "prefix"):
                assert " ".join(sample["prompt"].split()) in texts
    assert [row["samples"] for row in read_rows(out / FILE)] == [row["samples"] for row in rows]
    assert capsys.readouterr().out.count("sample at step 2: ") == 2


def test_texts_are_those_of_the_checkpoint_and_follow_seed_and_step(tmp_path: Path, text_folder: Path) -> None:
    """Interrupted after an evaluation whose step was not saved, and gone on with: the same lines, each once."""
    samples = {"prompts": ["The for statement", "It is"], "max_new_tokens": 8}
    change = {"checkpoint.every_steps": 2, "steps": 6}
    (tmp_path / "whole").mkdir()
    wanted = rows_of(run(tmp_path / "whole", text_folder, samples, **change))
    assert len({row["samples"][0]["text"] for row in wanted}) > 2
    with pytest.MonkeyPatch.context() as patch:
        save = Session.save

        def stopping(self: Session) -> None:
            if self.state.step == 4:
                raise Preempted("killed in a save")
            save(self)

        patch.setattr(Session, "save", stopping)
        with pytest.raises(Preempted):
            run(tmp_path, text_folder, samples, **change)
    assert rows_of(run(tmp_path, text_folder, samples, **change)) == wanted
    likeliest = {"prompts": ["The for statement"], "max_new_tokens": 8, "temperature": 0}
    (tmp_path / "likeliest").mkdir()
    out = run(tmp_path / "likeliest", text_folder, likeliest)
    text = write(open_subject(out), "The for statement", Sampling(max_new_tokens=8))
    assert rows_of(out)[-1]["samples"] == [{"prompt": "The for statement", "text": text}]


def test_texts_change_nothing_of_the_run(tmp_path: Path, text_folder: Path) -> None:
    found = []
    for name, samples in (("with", {"max_new_tokens": 5}), ("without", None)):
        (tmp_path / name).mkdir()
        out = run(tmp_path / name, text_folder, samples, **{"data.validation": {"ratio": 0.05, "tokens": 2000}})  # type: ignore[arg-type]
        found.append([row["loss"] for row in metrics(out) if row["kind"] == "train"])
    assert found[0] == found[1]


def test_a_prompt_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path: Path, text_folder: Path) -> None:
    with pytest.raises(EvaluationError, match="no mask to fill"):
        run(tmp_path, text_folder, {"prompts": ["no gap"]}, **RUNS["masked"])
    assert not (tmp_path / "run").exists()


def test_a_signal_ends_them(tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tokens of the first step's texts; the texts are written when the run goes on."""
    goes_on, asked = Loop._goes_on, []

    def told(self: Loop) -> bool:
        asked.append(self.session.state.step)
        if asked.count(2) == 15:
            self.stop.request()
        return goes_on(self)

    samples = {"prompts": ["The"], "max_new_tokens": 40}
    change = {"data.validation": None, "evaluate.every_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_goes_on", told)
        with pytest.raises(Preempted, match="stopped by a signal after step 2"):
            run(tmp_path, text_folder, samples, **change)
    assert asked.count(2) == 15
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [0]
    assert [row["step"] for row in rows_of(run(tmp_path, text_folder, samples, **change))] == [0, 2, 4]
