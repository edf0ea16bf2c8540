"""Exports of prefix, hybrid and span runs: the right stock class, the loss of the checkpoint, text that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from lmssl import checkpoint, cli
from lmssl.data.batch import SequenceBatch
from lmssl.data.stream import SequenceStream
from lmssl.export import export_run, load_model
from lmssl.objective.base import MicroBatch
from lmssl.objective.build import build_objective
from lmssl.objective.module import LossModule
from lmssl.recipe.load import load_recipe
from lmssl.release.private import findings
from lmssl.tokenizer.load import load_tokenizer
from lmssl.train.run import train
from runs import small_recipe, write_recipe

LLAMA = {"kind": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2}
SECTIONS: dict[str, dict[str, Any]] = {
    "prefix": {"tokenizer": {"path": "tokenizer/bpe-4k"}, "model": LLAMA},
    "hybrid": {"tokenizer": {"path": "tokenizer/wordpiece-8k"}, "model": LLAMA},
    **{
        f"span, {kind}": {"tokenizer": {"path": "tokenizer/t5-8k"}, "model": {"kind": kind, **T5}}
        for kind in ("t5", "umt5", "mt5")
    },
}
CLASSES = {"prefix": "AutoModelForCausalLM", "hybrid": "AutoModelForCausalLM", "span": "AutoModelForSeq2SeqLM"}


@pytest.fixture(scope="module", params=SECTIONS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    kind = request.param.partition(",")[0]
    folder = tmp_path_factory.mktemp(kind)
    changes = {"objective": {"kind": kind}, "train.ema_decay": 0.5, **SECTIONS[request.param]}
    recipe = small_recipe(text_folder, folder / "run", folder / "cache", steps=3, **changes)
    run = train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))
    done = export_run(run, None, folder / "out", lambda _: None)
    assert done.max_logits_difference < 1e-5 and done.step == 3
    return done.path


def test_nothing_tells_where_it_was_made(exported: Path) -> None:
    assert list(findings(exported, (str(exported.parent), str(Path.cwd()), "/" + exported.parent.name))) == []


def kind_of(exported: Path) -> str:
    return str(load_recipe(exported.parent / "run" / "recipe.yaml").recipe.objective.kind)


def stock(exported: Path) -> PreTrainedModel:
    """As anybody loads it, without a word from transformers."""
    auto_class = getattr(transformers, CLASSES[kind_of(exported)])
    model, said = auto_class.from_pretrained(exported, output_loading_info=True)
    assert not any(said.values()), said
    found: PreTrainedModel = model.eval()
    return found


def held_out(exported: Path) -> tuple[LossModule, MicroBatch]:
    """The checkpoint with its objective, and the first held-out sequences."""
    run = exported.parent / "run"
    recipe, tokenizer = load_recipe(run / "recipe.yaml").recipe, load_tokenizer(run / "tokenizer")
    stream = SequenceStream.open(recipe.data, tokenizer, recipe.data_seed, Path(recipe.data.cache))
    (split,) = stream.validation()
    objective = build_objective(recipe, tokenizer, num_positions=1000)
    batch = SequenceBatch.of([(i, split.window, i) for i in range(4)], split.window.layout)
    model = load_model(checkpoint.find_step(run, None))
    return LossModule(model, objective, bf16=False).eval(), objective.prepare(batch, evaluation=True)


def stock_loss(model: PreTrainedModel, inputs: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """Each example alone, by the class's own loss; of hybrid sequences those that are read from left to right."""
    total = torch.zeros(())
    segments_BT = inputs["segments_BE" if kind == "span" else "segments_BT"]
    for row in range(len(segments_BT)):
        if kind == "hybrid" and inputs["masked_B"][row]:
            continue
        for number in range(1, int(segments_BT[row].max()) + 1):
            inside = segments_BT[row] == number
            if kind == "span":
                ids = inputs["ids_BE"][row][inside]
                labels = inputs["targets_BO"][row][inputs["segments_BO"][row] == number]
                count = len(labels)
            else:
                ids = labels = inputs["ids_BT"][row][inside]
                count = len(labels) - 1
            if count > 0 and len(ids):
                total += model(input_ids=ids[None], labels=labels[None]).loss * count
    return total


def test_the_loss_after_reloading_is_the_loss_before(exported: Path) -> None:
    module, micro = held_out(exported)
    model, kind = stock(exported), kind_of(exported)
    with torch.no_grad():
        before = module(micro.inputs)
        if kind != "prefix":  # whose classes know no prefix
            wanted = stock_loss(model, micro.inputs, kind)
            torch.testing.assert_close(before[next(iter(before))], wanted, rtol=1e-5, atol=1e-3)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                part.set_attn_implementation("document")
        after = LossModule(model, module.objective, bf16=False).eval()(micro.inputs)
    assert all(micro.counts[name] > 20 for name in before)
    assert {name: value.item() for name, value in after.items()} == {n: v.item() for n, v in before.items()}


def test_it_generates(exported: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(exported), stock(exported)
    text = "The <extra_id_0> statement is <extra_id_1>." if kind_of(exported) == "span" else "The statement"
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    if kind_of(exported) == "span":
        assert ids[0, 0] == tokenizer.pad_token_id == model.config.decoder_start_token_id
        assert inputs["input_ids"][0, -1] == tokenizer.eos_token_id  # as in training
        assert ids.shape == (1, 6)
    else:
        assert ids.shape == (1, inputs["input_ids"].shape[1] + 5)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_the_card_and_config_name_the_class(exported: Path) -> None:
    kind = kind_of(exported)
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert f"from transformers import {CLASSES[kind]}, AutoTokenizer" in card
    assert f"pipeline_tag: {'text2text-generation' if kind == 'span' else 'text-generation'}" in card
    assert not any(name in card for name in set(CLASSES.values()) - {CLASSES[kind]})
    suffix = "ForConditionalGeneration" if kind == "span" else "ForCausalLM"
    assert stock(exported).config.architectures[0].endswith(suffix)


def test_averages_are_exported(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = exported.parent / "run"
    assert cli.main(["export", str(run), "--ema"]) == 0
    assert "exported step 3" in capsys.readouterr().out
    averages = checkpoint.find_step(run, None).tensors("ema")
    written, plain = (load_file(folder / "model.safetensors") for folder in (run / "export-ema", exported))
    assert written.keys() == plain.keys()
    # mT5's output matrix is its embedding, written once more.
    sources = {name: name if name in averages else "shared.weight" for name in written}
    assert all(torch.equal(written[name], averages[source]) for name, source in sources.items())
    assert any(not torch.equal(written[name], plain[name]) for name in written)
    assert "moving average" in (run / "export-ema" / "README.md").read_text(encoding="utf-8")
