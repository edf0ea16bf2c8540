"""An export is a complete transformers folder, equal to its checkpoint in a process that never imports lmssl."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmssl import checkpoint
from lmssl.cli import main
from lmssl.errors import CheckpointError, ExportError
from lmssl.export import export_run, verify
from lmssl.export.onnx_file import PACKAGES
from lmssl.recipe.load import load_recipe
from lmssl.release import private
from lmssl.release.private import findings
from lmssl.train.run import train
from runs import small_recipe, write_recipe

FAMILIES = {
    "llama": {"rope_theta": 500000.0},
    "llama-untied": {"tie_word_embeddings": False},
    "qwen3": {"kind": "qwen3", "head_dim": 64},
    "gpt2": {"kind": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2},
}


def trained(folder: Path, text: Path, family: str) -> Path:
    recipe = small_recipe(text, folder / "run", folder / "cache", steps=2)
    if family == "gpt2":
        recipe["model"] = {}
    recipe["model"] |= FAMILIES[family]
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    return trained(tmp_path_factory.mktemp("export"), text_folder, "llama")


@pytest.fixture(scope="module")
def out(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(run, None, tmp_path_factory.mktemp("out") / "out", lambda _: None).path


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_checkpoint(tmp_path: Path, text_folder: Path, family: str) -> None:
    run = trained(tmp_path, text_folder, family)
    said: list[str] = []
    done = export_run(run, None, tmp_path / "out", said.append)
    assert done.max_logits_difference < 1e-4
    assert "largest difference of logits" in said[-1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = load_file(checkpoint.find_step(run, None).path / "model.safetensors")
    named = dict(model.named_parameters())
    assert named.keys() == weights.keys()
    assert all(torch.equal(named[name], tensor) for name, tensor in weights.items())


def test_what_transformers_4_and_others_need_is_there(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == 500000.0
    assert config["torch_dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "_attn_implementation" not in config
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_max_length"] == 64
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == AutoTokenizer.from_pretrained(out).eos_token_id
    assert (out / "special_tokens_map.json").exists()
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o644}
    names = {p.name for p in out.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "lmssl.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_curve.svg",
    }


@pytest.mark.slow
def test_the_command_with_both_further_formats(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("gguf", *PACKAGES):
        pytest.importorskip(package)
    seen: list[tuple[str, ...]] = []
    private_words = private.private_words
    monkeypatch.setattr(private, "private_words", lambda **given: seen.append(words := private_words(**given)) or words)
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--onnx", "--gguf"]) == 0, capsys.readouterr().err
    assert float(capsys.readouterr().out.split()[-1]) < 1e-3
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert {"small.gguf", "onnx/model.onnx", "model.safetensors"} <= written
    assert list(findings(tmp_path / "out", (*seen[0], str(run.parent), str(tmp_path)))) == []


def test_a_private_word_stops_an_export(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmssl.export.folder._write_part", lambda *_, **__: 0.0)  # the card is enough
    with pytest.raises(ExportError, match="something private would be written: 'small'"):
        export_run(run, None, tmp_path / "out", private=("small",))
    assert list(tmp_path.iterdir()) == []


def test_relative_folders_work(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    relative = Path(f"export-{tmp_path.name}")
    assert export_run(Path(run.name), None, relative, lambda _: None).path == relative
    assert AutoModelForCausalLM.from_pretrained(relative).config.vocab_size == 4096


def test_tied_weights_stay_tied(out: Path) -> None:
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_card_is_valid_and_tells_data_numbers_and_recipe(out: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    for word in ("| text | text |", "2,048 tokens in 2 steps", "bits per byte", "micro_batch_sequences: 8"):
        assert word in card.text


def test_an_occupied_folder_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ExportError, match="not empty"):
        export_run(run, None, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_no_run_and_no_such_step(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none was saved"):
        export_run(tmp_path / "nowhere", None, tmp_path / "out")
    with pytest.raises(CheckpointError, match="step 7"):
        export_run(run, 7, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unwritable_place(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="could not be written"):
        export_run(run, None, tmp_path / "file" / "out")


@pytest.mark.parametrize(("name", "says"), [("logits", "logits differ by 1"), ("loss", "its loss is")])
def test_a_reload_that_differs_is_refused_and_leaves_nothing(
    name: str, says: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = verify.VERIFY.replace(f'"{name}": {name}', f'"{name}": {name} + 1')
    assert broken != verify.VERIFY
    monkeypatch.setattr(verify, "VERIFY", broken)
    with pytest.raises(ExportError, match=says):
        export_run(run, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_reload_that_fails_shows_why(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "VERIFY", "raise SystemExit('no such architecture')")
    with pytest.raises(ExportError, match="no such architecture"):
        export_run(run, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
