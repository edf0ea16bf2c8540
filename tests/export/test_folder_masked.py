"""Exports of masked models are what people load them for: masks to fill, an encoder, a start for fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from lmssl import checkpoint
from lmssl.data.batch import SequenceBatch
from lmssl.data.stream import SequenceStream
from lmssl.export import export_run, load_model
from lmssl.model.head import IGNORE
from lmssl.objective.build import build_objective
from lmssl.objective.module import LossModule
from lmssl.recipe.load import load_recipe
from lmssl.release.private import findings
from lmssl.tokenizer.load import load_tokenizer
from lmssl.train.run import train
from runs import metrics, small_recipe, write_recipe

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "modernbert": SIZES | {"local_attention": 16, "global_attn_every_n_layers": 2},
    "electra": SIZES | {"embedding_size": 16},
    "eurobert": SIZES,
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
}


BYTE_LEVEL = "modernbert, byte-level"
"""With the tokenizer of recipes/pretrain/modernbert-*.yaml, which has no unknown token and keeps white space."""


def trained(folder: Path, text: Path, name: str) -> Path:
    kind = name.partition(",")[0]
    recipe = small_recipe(text, folder / "run", folder / "cache", steps=3)
    recipe["tokenizer"] = {"path": f"tokenizer/{'bpe-32k-masked' if name == BYTE_LEVEL else 'wordpiece-8k'}"}
    recipe["objective"] = {"kind": "masked"}
    recipe["model"] = {"kind": kind, **KINDS[kind]}
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


@pytest.fixture(scope="module", params=[*KINDS, BYTE_LEVEL])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp(request.param.partition(",")[0])
    done = export_run(trained(folder, text_folder, request.param), None, folder / "out", lambda _: None)
    assert done.max_logits_difference < 1e-5 and done.step == 3
    return done.path


def test_nothing_tells_where_it_was_made(exported: Path) -> None:
    assert list(findings(exported, (str(exported.parent), str(Path.cwd()), "/" + exported.parent.name))) == []


def held_out(run: Path) -> SequenceBatch:
    """The first held-out sequences of a run."""
    recipe = load_recipe(run / "recipe.yaml").recipe
    tokenizer = load_tokenizer(run / "tokenizer")
    stream = SequenceStream.open(recipe.data, tokenizer, recipe.data_seed, Path(recipe.data.cache))
    (split,) = stream.validation()
    return SequenceBatch.of([(i, split.window, i) for i in range(4)], split.window.layout)


def test_the_loss_after_reloading_is_the_loss_before(exported: Path) -> None:
    """Ours on packed rows, from the checkpoint, against the stock class on each document, from the export."""
    run = exported.parent / "run"
    packed, recipe = held_out(run), load_recipe(run / "recipe.yaml").recipe
    objective = build_objective(recipe, load_tokenizer(run / "tokenizer"), num_positions=1000)
    micro = objective.prepare(packed, evaluation=True)
    model = load_model(checkpoint.find_step(run, None))
    with torch.no_grad():
        before = LossModule(model, objective, bf16=False).eval()(micro.inputs)["masked"]
    stock, after = AutoModelForMaskedLM.from_pretrained(exported).eval(), torch.zeros(())
    places, targets = micro.inputs["places_BC"], micro.inputs["targets_BC"]
    labels = torch.full_like(micro.inputs["ids_BT"], IGNORE)
    for row in range(4):
        kept = targets[row] != IGNORE
        labels[row][places[row][kept]] = targets[row][kept]
        for number in range(1, int(packed.segments_BT[row].max()) + 1):
            inside = torch.from_numpy(packed.segments_BT[row] == number)
            wanted = labels[row][inside][None]
            if (wanted != IGNORE).any():
                with torch.no_grad():
                    loss = stock(input_ids=micro.inputs["ids_BT"][row][inside][None], labels=wanted).loss
                after = after + loss * (wanted != IGNORE).sum()
    assert micro.counts["masked"] > 20
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4)


def test_the_folder_says_what_it_is(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert config["architectures"][0].endswith("ForMaskedLM")
    assert config["pad_token_id"] == tokenizer.pad_token_id
    special = {name: value for name, value in config.items() if name.endswith("_token_id") and value is not None}
    assert all(value in tokenizer.all_special_ids for value in special.values()), special
    assert tokenizer.model_max_length == 64
    assert "pipeline_tag: fill-mask" in (exported / "README.md").read_text()


def test_masks_are_filled(exported: Path) -> None:
    fill = pipeline("fill-mask", model=str(exported), device="cpu")
    found = fill(f"The {fill.tokenizer.mask_token} statement is executed first.", top_k=3)
    assert len(found) == 3
    assert all(0 < entry["score"] < 1 and "statement is executed first" in entry["sequence"] for entry in found)


def test_it_is_an_encoder_of_sentences(exported: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(exported), device="cpu")
    long = "An expression statement evaluates the expression list. " * 20
    vectors = model.encode(["An expression statement.", "A class definition.", long])
    width = json.loads((exported / "config.json").read_text()).get("hidden_size", 32)
    assert vectors.shape == (3, width)
    assert abs(vectors[0] - vectors[1]).max() > 1e-4


def test_the_stock_trainer_fine_tunes_it(exported: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model, info = AutoModelForSequenceClassification.from_pretrained(exported, num_labels=2, output_loading_info=True)
    assert all(not name.startswith(model.base_model_prefix + ".") or "pooler" in name for name in info["missing_keys"])
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


def test_metrics_tell_accuracy(exported: Path) -> None:
    rows = metrics(exported.parent / "run")
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert all(row["bits_per_byte"] > 0 for row in rows)
    assert rows[0]["num_targets"] == pytest.approx(0.15 * 2000, rel=0.25)
