"""What is uploaded is a list of known files, whole, unchanged since they were proven, and without anything private."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import save_file

from lmssl.errors import PushError
from lmssl.push.staging import stage
from lmssl.release.marker import MARKER, read_marker, write_marker

SECRET = "hf_" + "A1b2C3d4" * 4


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    save_file({"w": np.zeros(3, np.float32)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def staged(model: Path, *, public: bool = False, licence: str | None = None, private: tuple[str, ...] = ()) -> Path:
    folder = model.parent / "staged"
    folder.mkdir()
    stage(model, folder, public=public, licence=licence, private=private)
    return folder


def test_only_known_files(model: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", ".env", "notes.txt"):
        (model / name).write_bytes(b"x")
    (model / "vocab.txt").symlink_to(model / ".env")
    (model / "checkpoint-5").mkdir()
    (model / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    folder = model.parent / "staged"
    folder.mkdir()
    found = stage(model, folder, public=False, licence=None, private=())
    assert list(found.sizes) == ["README.md", "config.json", MARKER, "model.safetensors"]
    assert set(found.left_out) == {
        *("training_args.bin", "optimizer.pt", ".env", "notes.txt", "vocab.txt", "checkpoint-5/model.safetensors")
    }
    assert {path.name for path in folder.iterdir()} == set(found.sizes)


def test_no_folder_and_no_model(tmp_path: Path, model: Path) -> None:
    with pytest.raises(PushError, match="no such folder"):
        stage(tmp_path / "nowhere", tmp_path, public=False, licence=None, private=())
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(PushError, match="no model: it has no weights as safetensors"):
        staged(model)


@pytest.mark.parametrize("damage", ["truncated", "config", "shard"])
def test_a_model_that_is_not_whole(model: Path, damage: str) -> None:
    if damage == "truncated":
        (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:40])
    elif damage == "config":
        (model / "config.json").write_text("{")
    else:
        index = {"weight_map": {"w": "model-00002-of-00002.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PushError, match="no whole model"):
        staged(model)


def test_weights_changed_since_the_export(model: Path) -> None:
    write_marker(model, {"identity": "a" * 16, "name": "tiny"})
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Edited by hand\n")
    folder = staged(model)
    assert read_marker(folder)["identity"] == "a" * 16
    assert read_marker(folder)["files"] != read_marker(model)["files"]  # the card's checksum is the new one
    save_file({"w": np.ones(3, np.float32)}, model / "model.safetensors", metadata={"format": "pt"})
    (model.parent / "again").mkdir()
    with pytest.raises(PushError, match=r"model.safetensors was changed since the export"):
        stage(model, model.parent / "again", public=False, licence=None, private=())


def test_a_licence_for_everybody(model: Path) -> None:
    (model / "README.md").write_text("# No front matter\n")
    with pytest.raises(PushError, match="names no licence"):
        staged(model, public=True)
    (model.parent / "staged2").mkdir()
    stage(model, model.parent / "staged2", public=True, licence="cc-by-4.0", private=())
    card = ModelCard.load(model.parent / "staged2" / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert "# No front matter" in card.text
    assert (model / "README.md").read_text() == "# No front matter\n"


def test_a_licence_that_is_none(model: Path) -> None:
    with pytest.raises(PushError, match="no licence in the Hub's words"):
        staged(model, licence="Apache 2.0")


def test_front_matter_that_is_none(model: Path) -> None:
    (model / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(PushError, match="front matter is no YAML"):
        staged(model)


def test_nothing_private(model: Path) -> None:
    (model / "README.md").write_text(f"---\nlicense: mit\n---\ntoken {SECRET}\n")
    with pytest.raises(PushError, match=r"a Hugging Face token in README.md") as caught:
        staged(model)
    assert SECRET not in str(caught.value)


def test_private_words_in_metadata_of_weights(model: Path) -> None:
    metadata = {"format": "pt", "made": "on gpu-node-17 by hand"}
    save_file({"w": np.zeros(3, np.float32)}, model / "model.safetensors", metadata=metadata)
    with pytest.raises(PushError, match=r"'gpu-node-17' in model.safetensors"):
        staged(model, private=("gpu-node-17",))


def test_a_marker_that_is_none(model: Path) -> None:
    (model / MARKER).write_text("[]")
    with pytest.raises(Exception, match="no marker"):
        staged(model)
