"""Exports of BERT with its task for pairs: the class that knows both, and the usual one that fills masks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, BertForPreTraining, pipeline

from lmssl import checkpoint, cli
from lmssl.data.batch import SequenceBatch
from lmssl.data.stream import SequenceStream
from lmssl.export import export_run, load_model
from lmssl.model.head import IGNORE
from lmssl.objective.build import build_objective
from lmssl.objective.module import LossModule
from lmssl.recipe.load import load_recipe
from lmssl.recipe.objective import seps_per_segment
from lmssl.tokenizer.load import load_tokenizer
from lmssl.train.run import train
from runs import metrics, small_recipe, write_recipe

MODEL = {
    "kind": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("sentence")
    recipe = small_recipe(text_folder, folder / "run", folder / "cache", steps=3)
    recipe |= {"tokenizer": {"path": "tokenizer/wordpiece-8k"}, "model": MODEL}
    recipe["objective"] = {"kind": "masked", "sentence_task": "next"}
    run = train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))
    done = export_run(run, None, folder / "out", lambda _: None)
    assert done.max_logits_difference < 1e-5 and done.step == 3
    return done.path


def test_both_losses_after_reloading_are_those_before(exported: Path) -> None:
    """Ours on packed rows, from the checkpoint, against the stock class on each pair, from the export."""
    run = exported.parent / "run"
    recipe, tokenizer = load_recipe(run / "recipe.yaml").recipe, load_tokenizer(run / "tokenizer")
    seps = seps_per_segment(recipe.objective)
    cache = Path(recipe.data.cache)
    stream = SequenceStream.open(recipe.data, tokenizer, recipe.data_seed, cache, seps_per_segment=seps)
    (split,) = stream.validation()
    rows = SequenceBatch.of([(i, split.window, i) for i in range(8)], split.window.layout)
    objective = build_objective(recipe, tokenizer, num_positions=1000)
    micro, model = objective.prepare(rows, evaluation=True), load_model(checkpoint.find_step(run, None))
    with torch.no_grad():
        before = LossModule(model, objective, bf16=False).eval()(micro.inputs)
    stock, total = AutoModelForPreTraining.from_pretrained(exported).eval(), torch.zeros(())
    assert type(stock) is BertForPreTraining and micro.counts["sentence"] > 4
    torch.testing.assert_close(masked_loss(stock, micro.inputs), before["masked"], rtol=1e-5, atol=1e-4)
    for row in range(8):
        kept = micro.inputs["follows_BP"][row] >= 0
        for place, follows in zip(
            micro.inputs["heads_BP"][row][kept], micro.inputs["follows_BP"][row][kept], strict=True
        ):
            segments = micro.inputs["segments_BT"][row]
            inside = segments == segments[place]
            ids, types = micro.inputs["ids_BT"][row][inside][None], micro.inputs["types_BT"][row][inside][None]
            with torch.no_grad():
                logits = stock(input_ids=ids, token_type_ids=types).seq_relationship_logits
            total = total + torch.nn.functional.cross_entropy(logits, follows[None])
    torch.testing.assert_close(total, before["sentence"], rtol=1e-5, atol=1e-4)


@torch.no_grad()
def masked_loss(stock: BertForPreTraining, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed over all targets, each pair read by itself."""
    labels = torch.full_like(inputs["ids_BT"], IGNORE)
    for row, targets in enumerate(inputs["targets_BC"]):
        labels[row, inputs["places_BC"][row][targets != IGNORE]] = targets[targets != IGNORE]
    total, count = torch.zeros(()), 0
    for row, segments in enumerate(inputs["segments_BT"]):
        for number in range(1, int(segments.max()) + 1):
            inside = segments == number
            ids, types = inputs["ids_BT"][row][inside][None], inputs["types_BT"][row][inside][None]
            logits, wanted = stock(input_ids=ids, token_type_ids=types).prediction_logits[0], labels[row][inside]
            total += torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum")
            count += int((wanted != IGNORE).sum())
    assert count == int((inputs["targets_BC"] != IGNORE).sum()) > 20
    return total


def test_it_also_is_a_masked_model(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["BertForPreTraining"] and config["type_vocab_size"] == 2
    both, masked = (auto.from_pretrained(exported) for auto in (AutoModelForPreTraining, AutoModelForMaskedLM))
    ids = torch.arange(10, 20)[None]
    torch.testing.assert_close(masked(input_ids=ids).logits, both(input_ids=ids).prediction_logits)
    fill = pipeline("fill-mask", model=str(exported), device="cpu")
    assert len(fill(f"The {fill.tokenizer.mask_token} statement is executed first.", top_k=3)) == 3


def test_metrics_tell_of_both(exported: Path) -> None:
    rows = metrics(exported.parent / "run")
    assert rows[0]["loss_sentence"] == pytest.approx(0.693, rel=0.1)
    assert all(0 <= row["sentence_accuracy"] <= 1 and 0 < row["paired_ratio"] <= 1 for row in rows)


def test_masks_are_filled_from_the_run_as_from_the_export(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    said = []
    for path in (exported.parent / "run", exported):
        capsys.readouterr()
        assert cli.main(["generate", str(path), "The [MASK] is"]) == 0
        said.append(capsys.readouterr().out)
    assert "%" in said[0] and said[0] == said[1]
