"""Recipes whose objective, model and tokenizer do not go together: one clear error before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmssl import cli
from lmssl.export import export_run
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, write_recipe

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
BPE, WORDPIECE, T5 = ({"path": f"tokenizer/{name}"} for name in ("bpe-4k", "wordpiece-8k", "t5-8k"))


def masked(kind: str = "bert", *, tokenizer: dict[str, str] = WORDPIECE, **model: Any) -> dict[str, Any]:
    return {"tokenizer": tokenizer, "objective": {"kind": "masked"}, "model": {"kind": kind, **SIZES, **model}}


def hiding(**objective: Any) -> dict[str, Any]:
    return masked() | {"objective": {"kind": "masked", **objective}}


def span(tokenizer: dict[str, str] = T5, **model: Any) -> dict[str, Any]:
    sizes = {"kind": "t5", "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    return {"tokenizer": tokenizer, "objective": {"kind": "span"}, "model": model or sizes}


CASES: dict[str, tuple[int, list[str], dict[str, Any]]] = {
    "no mask token": (4, ["no mask token", "mask_token", "tokenizer/bpe-4k"], masked(tokenizer=BPE)),
    "hybrid without a mask token": (4, ["no mask token"], {"objective": {"kind": "hybrid"}}),
    "no cls token": (3, ["data.cls", "no cls token", "data.cls: false"], {"data.cls": True, "data.eos": False}),
    "no sep token": (3, ["data.sep", "no sep token", "data.sep: false"], {"data.sep": True, "data.eos": False}),
    "cls beside eos": (2, ["data.cls", "data.eos: false"], masked() | {"data.eos": True}),
    "cls in span": (2, ["data.cls", "leave data.cls out"], span() | {"data.cls": True}),
    "no sentinels": (4, ["<extra_id_0>", "tokenizer/wordpiece-8k", "tokenizer/t5-8k"], span(WORDPIECE)),
    "a decoder under masked": (2, ["llama", "model.kind", "bert", "objective.kind: hybrid"], masked("llama")),
    "an encoder under causal": (
        2,
        ["bert", "model.kind", "llama", "objective.kind: masked"],
        masked() | {"objective": {"kind": "causal"}, "data.eos": False},
    ),
    "an encoder under hybrid": (2, ["bert", "model.kind", "llama"], masked() | {"objective": {"kind": "hybrid"}}),
    "a decoder under span": (2, ["llama", "t5", "objective.kind: causal"], span(kind="llama", **SIZES)),
    "t5 under masked": (2, ["t5", "objective.kind: span"], span(WORDPIECE) | {"objective": {"kind": "masked"}}),
    "deberta-v2": (5, ["deberta-v2 cannot pack", "modernbert"], masked("deberta-v2")),
    "deberta": (5, ["deberta cannot pack", "modernbert"], masked("deberta")),
    "a sentence task without a class for it": (
        2,
        ["objective.sentence_task", "modernbert", "use bert"],
        masked("modernbert") | {"objective": {"kind": "masked", "sentence_task": "next"}},
    ),
    "an encoder under replaced": (2, ["bert", "electra"], masked() | {"objective": {"kind": "replaced"}}),
    "an encoder unknown here": (5, ["albert", "use one of bert"], masked("albert")),
    "rate 0": (2, ["objective.rate is 0", "more than 0", "or leave it out: 0.3"], hiding(rate=0)),
    "rate 1": (2, ["objective.rate is 1", "less than 1", "or leave it out: 0.3"], hiding(rate=1)),
    "rate below 0": (2, ["objective.rate is -0.1", "more than 0"], hiding(rate=-0.1)),
    "evaluation_rate 1": (2, ["objective.evaluation_rate is 1", "leave it out: 0.15"], hiding(evaluation_rate=1)),
    "final_rate 0": (2, ["objective.final_rate is 0", "null or more than 0"], hiding(final_rate=0)),
    "final_rate 1.5": (2, ["objective.final_rate is 1.5", "less than 1"], hiding(final_rate=1.5)),
    "decay_ratio 0": (2, ["objective.decay_ratio is 0", "more than 0"], hiding(final_rate=0.1, decay_ratio=0)),
    "decay_ratio 2": (2, ["objective.decay_ratio is 2", "at most 1"], hiding(final_rate=0.1, decay_ratio=2)),
    "shares above 1": (2, ["objective.random_share", "0.3", "0.8", "line 1", "lower"], hiding(random_share=0.3)),
    "spans longer than the longest": (
        2,
        ["objective.mean_span_tokens", "20", "max_span_tokens=10", "line 1"],
        hiding(strategy="span", mean_span_tokens=20),
    ),
    "prefix ratios the wrong way round": (
        2,
        ["objective.min_prefix_ratio", "0.8", "0.2", "line 1"],
        {"objective": {"kind": "prefix", "min_prefix_ratio": 0.8, "max_prefix_ratio": 0.2}},
    ),
    "masked_ratio 1": (2, ["objective.masked_ratio is 1"], {"objective": {"kind": "hybrid", "masked_ratio": 1}}),
    "vocabulary below the tokenizer's": (5, ["8192", "4000", "model.vocab_size"], masked(vocab_size=4000)),
    "fewer positions than tokens": (
        2,
        ["model.max_position_embeddings", "32", "data.sequence_length=64"],
        masked(max_position_embeddings=32),
    ),
    "positions that begin after the pad id": (  # 64 positions are enough for all kinds but this
        5,
        ["65 tokens", "64 positions", "model.max_position_embeddings", "data.sequence_length"],
        masked("roberta", max_position_embeddings=64),
    ),
    "sequences of special tokens": (
        2,
        ["data.sequence_length is 2", "at least 8"],
        masked() | {"data.sequence_length": 2},
    ),
}


def recipe_at(folder: Path, text: Path, changes: dict[str, Any], **more: Any) -> Path:
    paths = {key: value for key, value in changes.items() if "." in key}
    recipe = small_recipe(text, folder / "run", folder / "cache", steps=3, **{**paths, **more})
    sections = {key: value for key, value in changes.items() if "." not in key}
    return write_recipe(folder / "recipe.yaml", recipe | sections)


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error(
    case: str, tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LMSSL_DEBUG", raising=False)
    code, words, changes = CASES[case]
    got = cli.main(["train", str(recipe_at(tmp_path, text_folder, changes))])
    said = capsys.readouterr().err
    assert got == code, said
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert "where:" in said and "remedy:" in said
    assert [word for word in words if word not in said] == []
    assert not (tmp_path / "run").exists()
    assert code == 3 or not (tmp_path / "cache").exists()  # refused before any text is tokenized


def no_number(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


HYBRID = {"tokenizer": WORDPIECE, "objective": {"kind": "hybrid", "evaluation_rate": 1e-9}}


@pytest.mark.parametrize("changes", [hiding(evaluation_rate=1e-9), HYBRID], ids=["masked", "hybrid"])
def test_held_out_text_without_a_target_has_no_loss(
    changes: dict[str, Any], tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None and not NaN: in the metrics, in the checkpoint, on the console and on the card."""
    run = train(load_recipe(recipe_at(tmp_path, text_folder, changes, **{"data.validation.tokens": 64})))
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=no_number)
    rows = [row for row in metrics(run) if row["kind"] == "evaluate"]
    assert len(rows) == 2
    said = capsys.readouterr().out
    if changes is HYBRID:
        assert all(row["loss"] > 0 and row["loss_masked"] is None and row["masked_accuracy"] is None for row in rows)
    else:
        assert all(row["num_targets"] == 0 for row in rows)
        assert all(row[name] is None for row in rows for name in ("loss", "bits_per_byte", "accuracy"))
        assert all(row["corpora"]["text"]["loss"] is None for row in rows)
        assert "validation at step 3: loss -  (0 targets)" in said
    (state,) = run.glob("checkpoints/*/state.json")
    json.loads(state.read_text(encoding="utf-8"), parse_constant=no_number)
    out = export_run(run, None, tmp_path / "out", lambda _: None).path
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "nan" not in card.lower()
    assert ("nothing to predict" in card) == (changes is not HYBRID)


def test_steps_without_a_target_have_no_loss_and_move_no_weight(tmp_path: Path, text_folder: Path) -> None:
    """So low a rate that hardly a row has a target: gradients of 0 are gradients, and the run goes on."""
    run = train(load_recipe(recipe_at(tmp_path, text_folder, hiding(rate=1e-9), **{"optim.weight_decay": 0.0})))
    rows = [row for row in metrics(run) if row["kind"] == "train"]
    assert [row["num_targets"] for row in rows] == [0] * 3
    assert [(row["loss"], row["accuracy"], row["bits_per_byte"]) for row in rows] == [(None, None, None)] * 3
    assert [(row["grad_norm"], row["skipped_steps"]) for row in rows] == [(0.0, 0)] * 3
