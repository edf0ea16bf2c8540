"""Which weights an export holds, in which numbers and files, whoever wrote the checkpoint."""

from __future__ import annotations

import getpass
import hashlib
import json
import platform
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmssl import checkpoint
from lmssl.errors import CheckpointError, ExportError
from lmssl.export import ExportWeights, export_run, load_model
from lmssl.recipe.load import load_recipe
from lmssl.release.marker import read_marker
from lmssl.release.private import findings
from lmssl.train.run import train
from runs import small_recipe, write_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """Three checkpoints of a model that moves fast."""
    folder = tmp_path_factory.mktemp("weights")
    changes = {"checkpoint": {"every_steps": 1, "keep_last": 3}, "train.ema_decay": 0.5}
    recipe = small_recipe(text_folder, folder / "run", folder / "cache", steps=4, **changes)
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


def exported(run: Path, out: Path, weights: ExportWeights, **given: str) -> Path:
    return export_run(run, None, out, lambda _: None, weights=weights, **given).path


def test_the_mean_of_the_last_checkpoints(run: Path, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out", ExportWeights(average=3))
    found = load_file(out / "model.safetensors")
    several = [checkpoint.find_step(run, step).tensors("model") for step in (2, 3, 4)]
    for name, tensor in found.items():
        wanted = torch.stack([tensors[name] for tensors in several]).mean(0)
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-8)
    assert not torch.equal(found["model.embed_tokens.weight"], several[-1]["model.embed_tokens.weight"])
    assert "mean of those of the last 3 checkpoints, up to step 4" in (out / "README.md").read_text()
    assert read_marker(out)["source"]["average"] == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_once_and_said(run: Path, tmp_path: Path, dtype: str) -> None:
    out = exported(run, tmp_path / "out", ExportWeights(dtype=dtype))
    wanted = checkpoint.find_step(run, None).tensors("model")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, wanted[name].to(getattr(torch, dtype)))
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == getattr(torch, dtype)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_rounding_is_measured_against_the_checkpoint(run: Path, tmp_path: Path) -> None:
    done = export_run(run, None, tmp_path / "out", lambda _: None, weights=ExportWeights(dtype="bfloat16"))
    found = AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32)
    exact = load_model(checkpoint.find_step(run, None))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        moved = (found(input_ids=ids).logits - exact(input_ids=ids).logits).abs().max()
    assert 1e-6 < moved < 0.1
    assert 1e-6 < done.max_logits_difference < 0.1


def test_too_much_rounding_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(export_run.__globals__["verify"].__globals__["ROUNDING_TOLERANCE"], "bfloat16", 1e-9)
    with pytest.raises(ExportError, match="bfloat16 moves logits by"):
        exported(run, tmp_path / "out", ExportWeights(dtype="bfloat16"))
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_float16(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    rewrite(copy, num_files=1, factor=1e6)
    with pytest.raises(ExportError, match="float16 cannot hold"):
        exported(copy, tmp_path / "out", ExportWeights(dtype="float16"))
    assert not (tmp_path / "out").exists()


def test_sharded_by_size(run: Path, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out", ExportWeights(), max_shard_size="300KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    assert files == {path.name for path in out.glob("model-*.safetensors")}
    model = AutoModelForCausalLM.from_pretrained(out)
    wanted = checkpoint.find_step(run, None).tensors("model")
    assert all(torch.equal(weight, wanted[name]) for name, weight in model.named_parameters())


def test_checkpoints_of_several_ranks(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    rewrite(copy, num_files=2, factor=1.0)
    out = exported(copy, tmp_path / "out", ExportWeights())
    wanted = checkpoint.find_step(run, None).tensors("model")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_file(out / "model.safetensors").items())


def rewrite(run: Path, *, num_files: int, factor: float) -> None:
    """The newest checkpoint as so many ranks would have written it, its weights multiplied."""
    path = checkpoint.step_folders(run)[-1]
    tensors = load_file(path / "model.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "model.safetensors").unlink()
    del manifest["files"]["model.safetensors"]
    for number in range(num_files):
        name = "model.safetensors" if num_files == 1 else f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        owned = {key: tensors[key] * factor for key in sorted(tensors)[number::num_files]}
        save_file(owned, path / name, metadata={"format": "pt"})
        content = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"dtype": "int8"}, "not written as int8"),
        ({"average": 0}, "a mean of 0"),
        ({"average": 2, "ema": True}, "two ways"),
    ],
)
def test_choices_that_cannot_be(given: dict[str, object], what: str) -> None:
    with pytest.raises(ExportError, match=what):
        ExportWeights(**given)  # type: ignore[arg-type]


def test_too_few_checkpoints(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="up to step 4 there are 3"):
        exported(run, tmp_path / "out", ExportWeights(average=4))


def test_a_size_that_is_none(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no size of a file"):
        exported(run, tmp_path / "out", ExportWeights(), max_shard_size="large")
    assert list(tmp_path.iterdir()) == []


def test_the_end_and_padding_that_generation_needs(run: Path, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out", ExportWeights())
    generation, tokenizer = json.loads((out / "generation_config.json").read_text()), AutoTokenizer.from_pretrained(out)
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    assert tokenizer.chat_template is None


def test_no_file_tells_of_people_and_machines(run: Path, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out", ExportWeights(), max_shard_size="300KB")
    recipe = (checkpoint.find_step(run, None).path / "recipe.yaml").read_text()
    assert str(run) in recipe  # there is something to leave out
    words = (str(run.parent), str(tmp_path), str(Path.home()), str(Path.cwd()), platform.node(), getpass.getuser())
    assert list(findings(out, words)) == []
    for path in out.iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert file.metadata() == {"format": "pt"}
        elif path.name != "tokenizer.json":  # a vocabulary is of words; nothing else of ours is in it
            content = path.read_text()
            assert not [word for word in words if word in content and len(word) > 4], path
