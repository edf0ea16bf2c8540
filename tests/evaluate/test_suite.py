"""Suites: their files, what they refuse, runs and folders, and the same answers in and out of training."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from lmssl.cli import main
from lmssl.errors import EvaluationError, RecipeError
from lmssl.evaluate import results
from lmssl.evaluate.questions import Result
from lmssl.evaluate.subject import open_subject, recipe_reader
from lmssl.evaluate.suite import evaluate_suite, load_suite, prepare_suite, result_row
from lmssl.export import export_run
from lmssl.objective.causal import CausalObjective
from lmssl.objective.module import LossModule
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, write_lines, write_recipe

PAIRS = [{"sentence_good": "The cats are here.", "sentence_bad": "The cats is here."}] * 2


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite of every kind that is answered by likelihoods."""
    (tmp_path / "text.txt").write_text(
        "A statement is executed.\n\nAnother one is not, as it seems.\n", encoding="utf-8"
    )
    write_lines(tmp_path / "pairs.jsonl", PAIRS)
    write_lines(tmp_path / "mc.jsonl", [{"question": "A", "choices": ["statement", "is is"], "answer": 0}])
    path = tmp_path / "suite.yaml"
    path.write_text(
        f"""evaluations:
  - {{name: text, kind: loss, corpus: {{name: text, kind: text, path: {tmp_path}/text.txt, document: paragraph}}}}
  - {{name: pairs, kind: minimal_pairs, path: {tmp_path}/pairs.jsonl}}
  - {{name: choice, kind: multiple_choice, path: {tmp_path}/mc.jsonl}}
""",
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: minimal_pairs, path", "kind: minimal_pairs, pth", "line 3"),
        ("kind: multiple_choice", "kind: multiple_chioce", "did you mean multiple_choice?"),
        ("name: choice", "name: pairs", "pairs is also the name of evaluations.1"),
        ("kind: text, path", "kind: text, weight: 1, path", "weight is for mixtures"),
        ("document: paragraph}", "document: paragraph}, stride_tokens: 32, context_tokens: 16", "leaves no context"),
        ("document: paragraph}", "document: paragraph}, mask_share: 0.95, random_share: 0.1", "more than 1 together"),
        ("evaluations:", "evaluation:", "did you mean evaluations?"),
    ],
)
def test_a_wrong_suite_is_explained(suite: Path, old: str, new: str, message: str) -> None:
    text = suite.read_text(encoding="utf-8")
    assert old in text
    suite.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_suite(suite)
    assert message in str(caught.value)


def test_tokens_have_no_text(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text("evaluations: [{name: a, kind: loss, corpus: {name: a, kind: tokens, path: x.ds}}]\n")
    with pytest.raises(RecipeError, match="of ready-made tokens no text is known"):
        load_suite(path)


def test_training_gets_the_same_answers(folder: Any, suite: Path, one: Accelerator) -> None:
    subject = open_subject(folder("llama"))
    questions = prepare_suite(load_suite(suite).evaluations, subject.reader)
    plain = evaluate_suite(subject.model, questions, one, batch_tokens=512)
    module = LossModule(subject.model, CausalObjective(), bf16=False).train()
    assert evaluate_suite(module, questions, one, batch_tokens=512) == plain
    assert module.training
    assert evaluate_suite(module, questions, one, batch_tokens=512, go_on=lambda: False) is None


def test_kinds_that_need_the_stock_model_are_not_for_training(folder: Any, tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text("evaluations: [{name: look, kind: samples, prompts: [The]}]\n")
    with pytest.raises(EvaluationError, match="samples is not for the training loop"):
        prepare_suite(load_suite(path).evaluations, open_subject(folder("llama")).reader)


def test_models_without_likelihood_are_refused(folder: Any, suite: Path) -> None:
    with pytest.raises(EvaluationError, match="this t5 gives no likelihood of a text"):
        prepare_suite(load_suite(suite).evaluations, open_subject(folder("t5")).reader)


@pytest.mark.parametrize("prefix", ["bos", "eos"])
def test_a_prefix_that_does_not_exist_is_refused(folder: Any, suite: Path, prefix: str) -> None:
    text = suite.read_text(encoding="utf-8").replace("kind: loss", f"kind: loss, prefix: {prefix}")
    suite.write_text(text, encoding="utf-8")
    with pytest.raises(EvaluationError, match=f"prefix: {prefix} is for causal models"):
        prepare_suite(load_suite(suite).evaluations, open_subject(folder("bert")).reader)


class TestFolders:
    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(EvaluationError, match="there is no such folder"):
            open_subject(tmp_path / "gone")
        with pytest.raises(EvaluationError, match=r"no model: there is no config\.json"):
            open_subject(tmp_path)

    def test_a_broken_config(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{", encoding="utf-8")
        with pytest.raises(EvaluationError, match="the model cannot be loaded") as caught:
            open_subject(tmp_path)
        assert caught.value.exit_code == 10

    def test_no_weights(self, folder: Any, tmp_path: Path) -> None:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((folder("llama") / name).read_bytes())
        with pytest.raises(EvaluationError, match="the model cannot be loaded"):
            open_subject(tmp_path)

    def test_a_body_without_its_head(self, folder: Any, tmp_path: Path) -> None:
        subject = open_subject(folder("bert"))
        subject.model.base_model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((folder("bert") / name).read_bytes())
        with pytest.raises(EvaluationError, match="BertModel has no language-modelling head"):
            open_subject(tmp_path)
        config["architectures"] = ["BertForMaskedLM"]
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(EvaluationError, match="the folder has no weights for 'cls"):
            open_subject(tmp_path)

    def test_steps_belong_to_runs(self, folder: Any) -> None:
        with pytest.raises(EvaluationError, match="has no steps"):
            open_subject(folder("llama"), step=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    recipe = small_recipe(text_folder, folder / "run", folder / "cache", steps=2)
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


def test_a_run_is_asked_about_its_own_held_out_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--json", "--batch-tokens", "200"]) == 0
    row = json.loads(capsys.readouterr().out)
    last = [line for line in metrics(run) if line["kind"] == "evaluate"][-1]
    assert (row["kind"], row["name"], row["step"]) == ("loss", "held-out", 2)
    assert row["metrics"]["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert row["metrics"]["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-5)
    assert list(results.read_rows(run / results.FILE))[-1] == row


ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
OBJECTIVES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "span": ({"kind": "span"}, "t5-8k", {"kind": "t5", "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "masked": ({"kind": "masked"}, "wordpiece-8k", {"kind": "bert", **ENCODER}),
    "sentences": ({"kind": "masked", "sentence_task": "next"}, "wordpiece-8k", {"kind": "bert", **ENCODER}),
    "hybrid": ({"kind": "hybrid"}, "wordpiece-8k", {"kind": "llama", **ENCODER}),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_held_out_text_of_other_objectives(
    name: str, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective, tokenizer, model = OBJECTIVES[name]
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=2)
    recipe |= {"objective": objective, "tokenizer": {"path": f"tokenizer/{tokenizer}"}, "model": model}
    run = train(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)))
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    last = [line for line in metrics(run) if line["kind"] == "evaluate"][-1]
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-3)  # trained in bfloat16
    assert found["num_targets"] == last["num_targets"]


def test_a_run_and_its_export_give_the_same_numbers(
    run: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_run(run, None, tmp_path / "export", lambda _line: None)
    out = tmp_path / "out" / "results.jsonl"
    for path in (run, tmp_path / "export"):
        assert main(["eval", str(path), "--suite", str(suite), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "bits" in printed and "pairs" in printed and "choice" in printed
    rows = list(results.read_rows(out))
    ours, theirs = rows[:3], rows[3:]
    assert [row["name"] for row in ours] == ["text", "pairs", "choice"]
    assert [row["step"] for row in rows] == [2, 2, 2, None, None, None]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["metrics"] == pytest.approx(other["metrics"], rel=1e-5)
    assert list(results.read_rows(run / results.FILE))[-3:] == ours
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", ours[0]["time"])


def test_the_moving_average_of_a_run(
    run: Path, suite: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=2)
    recipe["train"]["ema_decay"] = 0.5
    averaged = train(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)))
    export_run(averaged, None, tmp_path / "export", lambda _line: None, ema=True)
    rows = {}
    for name, path, *more in (("raw", averaged), ("mean", averaged, "--ema"), ("export", tmp_path / "export")):
        assert main(["eval", str(path), "--suite", str(suite), "--out", str(tmp_path / f"{name}.jsonl"), *more]) == 0
        rows[name] = list(results.read_rows(tmp_path / f"{name}.jsonl"))
    assert rows["mean"][0]["metrics"] == pytest.approx(rows["export"][0]["metrics"], rel=1e-5)
    assert rows["mean"][0]["metrics"]["loss"] != pytest.approx(rows["raw"][0]["metrics"]["loss"], rel=1e-4)
    assert [row.get("weights") for row in (rows["mean"][0], rows["raw"][0])] == ["ema", None]
    assert main(["eval", str(averaged), "--ema"]) == 0
    assert list(results.read_rows(averaged / results.FILE))[-1]["weights"] == "ema"
    assert main(["generate", str(averaged), "The", "--ema", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--ema"]) == 6
    assert "kept no moving average" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "export"), "--ema", "--suite", str(suite)]) == 10


def test_a_recipe_reads_texts_as_its_run(run: Path) -> None:
    subject = open_subject(run)
    assert subject.recipe is not None
    ours = recipe_reader(subject.recipe, subject.model.config, subject.tokenizer)
    theirs = subject.reader
    assert (ours.kind, ours.longest_tokens, ours.what) == (theirs.kind, 64, theirs.what)
    bos = subject.recipe.model_copy(update={"data": subject.recipe.data.model_copy(update={"bos": True})})
    assert recipe_reader(bos, subject.model.config, subject.tokenizer).around("auto", where="") == ([0], [])


def test_the_suite_of_the_guide_is_one(root: Path, tmp_path: Path) -> None:
    page = (root / "docs" / "evaluate.md").read_text(encoding="utf-8")
    kinds = set()
    for block in re.findall(r"^```yaml\n(evaluations:.*?)^```", page, flags=re.M | re.S):
        (tmp_path / "suite.yaml").write_text(block, encoding="utf-8")
        kinds |= {evaluation.kind for evaluation in load_suite(tmp_path / "suite.yaml").evaluations}
    assert kinds == {"loss", "minimal_pairs", "multiple_choice", "lm_eval", "samples"}


def test_a_checkpoint_is_opened_through_its_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints" / "step-00000002"
    assert main(["eval", str(folder)]) == 10
    assert f"{run} --step 2" in capsys.readouterr().err
    assert main(["eval", str(run), "--step", "9"]) == 6


def test_a_folder_without_a_suite_has_nothing_to_ask(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(folder("llama"))]) == 10
    assert "--suite FILE" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(EvaluationError, match="cannot be written"):
        results.append_rows(tmp_path / "file" / "rows.jsonl", [{}])


def test_lines_that_were_cut_off_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / results.FILE
    row = {"name": "a\u2028b\u0085c\x1c"}
    results.append_rows(path, [row])
    path.write_text(path.read_text(encoding="utf-8") + '{"name": "b', encoding="utf-8")
    assert list(results.read_rows(path)) == [row]


def test_tables_obey_no_text(suite: Path) -> None:
    evaluation = load_suite(suite).evaluations[1]
    parts = {"\x1b[31m[bold]a": {"accuracy": 1.0}, "b": {"accuracy": 0.5}}
    row = result_row(evaluation, Result({"accuracy": 0.75, "num_asked": 4}, parts), step=None, time="now")
    console = Console(width=100, record=True, file=io.StringIO())
    results.show([row], console)
    text = console.export_text()
    assert "[bold]a" in text and "\x1b" not in text and "0.7500" in text


def test_torch_is_not_needed_to_refuse_a_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text("evaluations: []\n", encoding="utf-8")
    assert main(["eval", str(tmp_path), "--suite", str(path)]) == 2
    assert "at least 1 item" in capsys.readouterr().err
    assert torch.is_grad_enabled()


def test_all_tasks_of_an_objective_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"loss": 2.5, "num_targets": 10, "loss_sentence": 0.625, "sentence_accuracy": 0.75, "paired_ratio": 0.5}
    results.show([{"kind": "loss", "name": "held-out", "metrics": metrics}], Console(width=120))
    said = capsys.readouterr().out
    assert "loss sentence" in said and "0.6250" in said and "sentence accuracy" in said and "0.7500" in said
    assert "paired" not in said
