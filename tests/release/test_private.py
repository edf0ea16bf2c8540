"""What tells of people and machines is found, whatever file it stands in, and left out of recipes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lmssl.release.private import findings, private_words, shortened

HOME = "/{}/ann".format("home")  # put together here: no file of the project names a home
TOKEN = "hf_" + "Zz9" * 8
PRIVATE = {
    TOKEN: "a Hugging Face token",
    "sk-" + "a1" * 15: "an API key",
    "AKIA" + "ABCD1234" * 2: "an API key",
    "ghp_" + "x" * 36: "an API key",
    "-----BEGIN RSA PRIVATE KEY-----": "a private key",
    "s3://ann:pw12@bucket/x": "a password in a URL",
    f"cache: {HOME}/x": HOME,
    f'"file://{HOME}/x"': HOME,
    f"path: ../..{HOME}/x": f"../..{HOME}",
}


@pytest.mark.parametrize("text", PRIVATE)
def test_found_in_texts_and_named_without_being_repeated(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"before {text} after")
    (found,) = findings(tmp_path)
    assert PRIVATE[text] in found
    assert "README.md" in found
    assert TOKEN not in found


def test_found_in_metadata_and_json(tmp_path: Path) -> None:
    save_file({"w": np.zeros(2)}, tmp_path / "model.safetensors", metadata={"note": TOKEN})
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": f"{HOME}/base"}))
    assert len(list(findings(tmp_path))) == 2


def test_words_and_what_only_looks_like_them(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("trained on node-7; the other node-75 and hf_transfer, /homepage, a/root/b")
    assert list(findings(tmp_path, ("node-7",))) == ["'node-7' in README.md"]
    assert list(findings(tmp_path, ("node-9", ""))) == []


def test_a_user_in_a_path_and_not_in_a_sentence_or_an_address(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("by ann; https://huggingface.co/ann/model; /annals; s3://bucket/ann/x")
    assert list(findings(tmp_path, ("/ann",))) == []
    for path in ("../ann/corpora", "nas/ann/x", "file:///nas/ann"):
        readme.write_text(f"see {path}")
        assert list(findings(tmp_path, ("/ann",))) == ["'/ann' in README.md"]


def test_a_vocabulary_may_hold_paths_and_no_token(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps([f"{HOME}/x", "node-7"]))
    assert list(findings(tmp_path, ("node-7",))) == []
    (tmp_path / "tokenizer.json").write_text(json.dumps([TOKEN]))
    assert len(list(findings(tmp_path))) == 1


def test_recipes_keep_all_but_where_things_are() -> None:
    recipe = {
        "out": f"{HOME}/runs/x",
        "data": {"mixture": [{"path": ["~/corpus/*.txt", "corpora/*.txt", r"C:\Users\ann\x.txt"], "weight": 0.5}]},
        "url": "https://ann:pw@host:8/x?sig=1#y",
        "note": f"see {TOKEN}",
        "file": f"file://{HOME}/z.txt",
        "up": ["../../home/ann/*.txt", "a/../../ann/x", "a..b/x", r"..\ann\y.txt"],
        "none": None,
    }
    assert shortened(recipe) == {
        "out": ".../x",
        "data": {"mixture": [{"path": [".../*.txt", "corpora/*.txt", ".../x.txt"], "weight": 0.5}]},
        "url": "https://host:8/x",
        "note": "see (removed)",
        "file": ".../z.txt",
        "up": [".../*.txt", ".../x", "a..b/x", ".../y.txt"],
        "none": None,
    }


def test_a_machine_without_a_telling_name() -> None:
    assert private_words(home=Path("/"), working=Path("/"), host="localhost") == ()
    assert private_words(home=Path("/a/b"), working=Path("/a/b"), host="gpu-17") == ("/a/b", "gpu-17")
    assert private_words(home=Path("/"), working=Path("/"), host="x", user="root") == ()
    assert private_words(home=Path("/a/ann"), working=Path("/"), host="x", user="ann") == ("/a/ann", "/ann")
