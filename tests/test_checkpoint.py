"""Checkpoints appear whole or not at all, and only whole ones are found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lmssl import checkpoint
from lmssl.errors import CheckpointError

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=True,
)


def save(run: Path, step: int) -> checkpoint.Checkpoint:
    tensors = {"model.safetensors": {"a": torch.full((4,), float(step))}}
    return checkpoint.save(run, step, tensors=tensors, texts={"state.json": json.dumps({"step": step})})


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 3)
    found = checkpoint.find_step(tmp_path, None)
    assert found.step == 3
    assert torch.equal(found.tensors("model.safetensors")["a"], torch.full((4,), 3.0))
    assert json.loads(found.text("state.json")) == {"step": 3}
    assert {p.stat().st_mode & 0o777 for p in found.path.glob("*.safetensors")} == {0o644}


def test_newest_is_found_and_pruning_keeps_the_last(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        save(tmp_path, step)
    (checkpoint.checkpoints_path(tmp_path) / ".tmp-step-00000011").mkdir()
    assert checkpoint.find_step(tmp_path, None).step == 10
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in checkpoint.checkpoints_path(tmp_path).iterdir()) == ["step-00000009", "step-00000010"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "flipped bit": lambda p: flip(p / "model.safetensors"),
    "truncated": lambda p: os.truncate(p / "model.safetensors", 40),
    "missing file": lambda p: (p / "state.json").unlink(),
    "missing manifest": lambda p: (p / "manifest.json").unlink(),
    "empty manifest": lambda p: (p / "manifest.json").write_text(""),
    "manifest of another shape": lambda p: (p / "manifest.json").write_text("[1]"),
    "manifest not text": lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"),
    "newer format": lambda p: (p / "manifest.json").write_text('{"format": 99, "files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    DAMAGE[damage](save(tmp_path, 2).path)
    said: list[str] = []
    found = checkpoint.find_latest(tmp_path, said.append)
    assert found is not None
    assert found.step == 1
    assert len(said) == 1
    assert "step-00000002" in said[0]


def test_asking_for_a_damaged_or_absent_step_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none was saved"):
        checkpoint.find_step(tmp_path, None)
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="no valid checkpoint of step 5") as error:
        checkpoint.find_step(tmp_path, 5)
    assert error.value.remedy == "steps there: 1"


@pytest.mark.parametrize("broken", ["model.safetensors", "manifest.json", "rename"])
def test_a_failing_disk_leaves_the_earlier_checkpoint_and_no_partial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    save(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    target = {
        "model.safetensors": (checkpoint, "save_file"),
        "manifest.json": (checkpoint, "write_synced"),
        "rename": (Path, "rename"),
    }[broken]
    monkeypatch.setattr(*target, full)
    with pytest.raises(CheckpointError, match="step 2 could not be written: .*No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in checkpoint.checkpoints_path(tmp_path).iterdir()] == ["step-00000001"]
    assert checkpoint.find_step(tmp_path, None).step == 1


def test_an_invalid_leftover_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    flip(save(tmp_path, 2).path / "model.safetensors")
    save(tmp_path, 2)
    assert checkpoint.find_step(tmp_path, 2).step == 2


def test_weights_and_optimizer_round_trip_bit_for_bit(tmp_path: Path) -> None:
    def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        advance(model, optimizer, range(steps))
        return model, optimizer

    def advance(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = trained(3)
    tensors = {
        "model.safetensors": checkpoint.named_weights(model),
        "optim.safetensors": checkpoint.named_optimizer_state(model, optimizer),
    }
    found = checkpoint.save(tmp_path, 3, tensors=tensors, texts={})
    assert "lm_head.weight" not in found.tensors("model.safetensors")
    fresh, fresh_optimizer = trained(0)
    checkpoint.load_weights(fresh, found.tensors("model.safetensors"), where="here")
    checkpoint.load_optimizer_state(fresh, fresh_optimizer, found.tensors("optim.safetensors"))
    for each in (model, optimizer), (fresh, fresh_optimizer):
        advance(*each, range(3, 6))
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_of_another_model_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG)
    tensors = checkpoint.named_weights(model)
    tensors["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        checkpoint.load_weights(model, tensors, where="here")
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        checkpoint.load_weights(model, tensors, where="here")
