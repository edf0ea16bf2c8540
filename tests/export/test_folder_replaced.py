"""Exports of ELECTRA: the model in the folder, its generator inside it, both as people load them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from lmssl import checkpoint, cli
from lmssl.data.batch import SequenceBatch
from lmssl.data.stream import SequenceStream
from lmssl.export import export_run, load_model
from lmssl.model.electra import ElectraPair
from lmssl.model.head import IGNORE
from lmssl.objective.build import build_objective
from lmssl.objective.module import LossModule
from lmssl.recipe.load import load_recipe
from lmssl.release.private import findings
from lmssl.tokenizer.load import load_tokenizer
from lmssl.train.run import train
from runs import metrics, small_recipe, write_recipe
from sequences import segments_of

MODEL = {
    "kind": "electra",
    "embedding_size": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("replaced")
    recipe = small_recipe(text_folder, folder / "run", folder / "cache", steps=3)
    recipe |= {"tokenizer": {"path": "tokenizer/wordpiece-8k"}, "model": MODEL}
    recipe["objective"] = {"kind": "replaced", "generator_ratio": 0.5}
    recipe["train"]["ema_decay"] = 0.9
    run = train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))
    export_run(run, None, folder / "out", lambda _: None)
    return folder / "out"


def test_nothing_tells_where_it_was_made(exported: Path) -> None:
    assert list(findings(exported, (str(exported.parent), str(Path.cwd()), "/" + exported.parent.name))) == []


def test_the_losses_after_reloading_are_those_before(exported: Path) -> None:
    """Ours on packed rows, from the checkpoint, against the stock classes on each document, from the export."""
    run = exported.parent / "run"
    recipe, tokenizer = load_recipe(run / "recipe.yaml").recipe, load_tokenizer(run / "tokenizer")
    stream = SequenceStream.open(recipe.data, tokenizer, recipe.data_seed, Path(recipe.data.cache))
    (split,) = stream.validation()
    rows = SequenceBatch.of([(i, split.window, i) for i in range(4)], split.window.layout)
    objective = build_objective(recipe, tokenizer, num_positions=1000)
    micro, model = objective.prepare(rows, evaluation=True), load_model(checkpoint.find_step(run, None))
    assert isinstance(model, ElectraPair)
    seen: list[torch.Tensor] = []
    model.discriminator.electra.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        before = LossModule(model, objective, bf16=False).eval()(micro.inputs)
    detector = AutoModelForPreTraining.from_pretrained(exported).eval()
    generator = AutoModelForMaskedLM.from_pretrained(exported / "generator").eval()
    original, masked, replaced = torch.from_numpy(rows.ids_BT), torch.zeros(()), torch.zeros(())
    labels = torch.where(micro.inputs["slots_BT"] < 0, IGNORE, original)
    for row, _, place in segments_of(rows):
        wanted, filled = labels[row][place][None], seen[0][row][place][None]
        with torch.no_grad():
            if (wanted != IGNORE).any():
                out = generator(input_ids=micro.inputs["ids_BT"][row][place][None], labels=wanted)
                masked = masked + out.loss * (wanted != IGNORE).sum()
            changed = (filled != original[row][place]).long()
            replaced = replaced + detector(input_ids=filled, labels=changed).loss * len(place)
    torch.testing.assert_close(masked, before["masked"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(replaced, before["replaced"], rtol=1e-5, atol=1e-4)


def test_both_folders_say_what_they_are(exported: Path) -> None:
    config, inner = (json.loads((exported / name / "config.json").read_text()) for name in ("", "generator"))
    assert config["architectures"] == ["ElectraForPreTraining"] and config["hidden_size"] == 32
    assert inner["architectures"] == ["ElectraForMaskedLM"] and inner["hidden_size"] == 16
    assert inner["embedding_size"] == config["embedding_size"] == 16
    card = (exported / "README.md").read_text()
    assert 'subfolder="generator"' in card and "replaced-token detection" in card
    body = AutoModel.from_pretrained(exported)
    there = AutoModelForPreTraining.from_pretrained(exported)
    assert type(body).__name__ == "ElectraModel"
    assert all(p.equal(q) for p, q in zip(body.parameters(), there.electra.parameters(), strict=True))
    filler = AutoModelForMaskedLM.from_pretrained(exported, subfolder="generator")
    assert filler.electra.embeddings.word_embeddings.weight.equal(there.electra.embeddings.word_embeddings.weight)


def test_the_generator_fills_masks(exported: Path) -> None:
    fill = pipeline("fill-mask", model=str(exported / "generator"), device="cpu")
    found = fill(f"The {fill.tokenizer.mask_token} statement is executed first.", top_k=3)
    assert len(found) == 3
    assert all("statement is executed first" in entry["sequence"] for entry in found)


def test_there_is_an_average_of_both(exported: Path) -> None:
    found = checkpoint.find_step(exported.parent / "run", None)
    weights, averages = (dict(load_model(found, ema=ema).named_parameters()) for ema in (False, True))
    assert weights.keys() == averages.keys()
    assert not any(weights[name].equal(averages[name]) for name in weights if name.endswith("dense.weight"))


def test_the_stock_trainer_fine_tunes_it(exported: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model, info = AutoModelForSequenceClassification.from_pretrained(exported, num_labels=2, output_loading_info=True)
    assert all(name.startswith("classifier.") for name in info["missing_keys"])
    texts = ["if statement", "while loop", "class body", "def name"] * 4
    rows = [{**tokenizer(text), "label": number % 2} for number, text in enumerate(texts)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train().training_loss < 2.0


def test_metrics_tell_of_both(exported: Path) -> None:
    rows = metrics(exported.parent / "run")
    assert rows[0]["loss"] == pytest.approx(math.log(8192), rel=0.05)  # the generator's
    assert rows[0]["loss_replaced"] == pytest.approx(math.log(2), rel=0.05)
    assert all(0 <= row["accuracy"] <= 1 and 0 <= row["detection_accuracy"] <= 1 for row in rows)
    assert rows[0]["replaced_ratio"] == pytest.approx(0.15, abs=0.02)


def test_the_discriminator_sends_who_wants_words_to_the_generator(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", str(exported), "A [MASK] raises an [MASK]."]) == 10
    said = " ".join(capsys.readouterr().err.split())
    assert "no language-modelling head" in said and str(exported / "generator") in said.replace(" ", "")
