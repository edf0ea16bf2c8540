"""Tensors by name: owners, files, out of a model and back into it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lmssl import checkpoint
from lmssl.checkpoint import Checkpoint
from lmssl.checkpoint.checksums import fingerprint
from lmssl.checkpoint.tensors import TensorFiles, write_tensors
from lmssl.errors import CheckpointError

Save = Callable[..., Checkpoint]

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=True,
)


@given(st.lists(st.integers(1, 10**6), max_size=60), st.integers(1, 9))
def test_owners_share_evenly_and_always_alike(sizes: list[int], num_ranks: int) -> None:
    named = {f"w{index}": size for index, size in enumerate(sizes)}
    found = checkpoint.owners(named, num_ranks)
    assert list(found) == list(named)
    loads = [sum(named[name] for name, owner in found.items() if owner == rank) for rank in range(num_ranks)]
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert found == checkpoint.owners(dict(named), num_ranks)


def test_a_file_is_as_safetensors_writes_it_and_its_hash_is_true(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(70, 30, generator=torch.Generator().manual_seed(1)),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "scalar": torch.tensor(3.0),
        "nothing": torch.zeros(0, 4),
        "naïve name": torch.ones(1),
    }
    found = write_tensors(tmp_path / "x.safetensors", tensors)
    content = (tmp_path / "x.safetensors").read_bytes()
    hashes = {"sha256": hashlib.sha256(content).hexdigest(), "xxh128": xxhash.xxh128_hexdigest(content)}
    assert found == {"size": len(content), **hashes} == fingerprint(tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_file_of_nothing_is_one(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {})
    assert dict(TensorFiles([tmp_path / "x.safetensors"])) == {}


def test_tensors_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmssl.checkpoint.tensors._CHUNK_BYTES", 64)
    tensor = torch.arange(1001.0)
    found = write_tensors(tmp_path / "x.safetensors", {"a": tensor})
    assert found == fingerprint(tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], tensor)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    tensor = torch.zeros(100)
    tensor[57] = value
    with pytest.raises(CheckpointError, match="layers.3.weight holds numbers that are not finite"):
        write_tensors(tmp_path / "x.safetensors", {"good": torch.ones(2), "layers.3.weight": tensor})


def test_only_float32_from_cpu_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="w is torch.bfloat16 on cpu"):
        write_tensors(tmp_path / "x.safetensors", {"w": torch.zeros(2, dtype=torch.bfloat16)})


def test_several_files_are_one_group(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    write_tensors(tmp_path / "b.safetensors", {"y": torch.zeros(3)})
    found = TensorFiles([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert list(found) == ["x", "y"] and "y" in found and "z" not in found
    assert torch.equal(found["y"], torch.zeros(3))


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x10")
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        TensorFiles([tmp_path / "a.safetensors"])
    assert str(tmp_path) in str(error.value)


def test_weights_round_trip_bit_for_bit(tmp_path: Path, save: Save) -> None:
    torch.manual_seed(0)
    model, fresh = (AutoModelForCausalLM.from_config(CONFIG) for _ in range(2))
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found = save(tmp_path, 3, tensors={"model": tensors})
    assert "lm_head.weight" not in found.tensors("model")  # tied weights are saved once
    checkpoint.load_weights(fresh, found.tensors("model"), where="here")
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    assert checkpoint.validate(found.path) is None  # training on does not reach into the file


def test_weights_of_another_model_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG)
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tensors["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        checkpoint.load_weights(model, tensors, where="here")
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        checkpoint.load_weights(model, tensors, where="here")
