from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmssl.errors import TokenizerError
from lmssl.tokenizer.load import Tokenizer, load_tokenizer


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["bpe-masked"], tmp_path / "copy"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_ids_come_from_the_config(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.backend.token_to_id
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id) == (ids("[PAD]"), ids("[UNK]"), ids("[CLS]"))
    assert (tokenizer.sep_id, tokenizer.mask_id) == (ids("[SEP]"), ids("[MASK]"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    assert tokenizer.path == folder


def test_number_of_tokens_is_the_largest_id_plus_one(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.num_tokens == max(tokenizer.backend.get_vocab().values()) + 1 == 512


def test_token_may_be_an_object_or_stand_in_the_map_only(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    change(config, cls_token=None, sep_token={"content": "[MASK]", "lstrip": False})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.cls_id == tokenizer.backend.token_to_id("[CLS]")
    assert tokenizer.sep_id == tokenizer.backend.token_to_id("[MASK]")


def test_tokenizer_json_alone_is_enough(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    assert load_tokenizer(folder).mask_id is None


def test_decode_writes_control_tokens_out(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.mask_id is not None
    assert tokenizer.decode([tokenizer.mask_id, *tokenizer.backend.encode("a b", add_special_tokens=False).ids]) == (
        "[MASK]a b"
    )


def test_fingerprint_ignores_layout_padding_and_truncation(folder: Path) -> None:
    before = load_tokenizer(folder).fingerprint
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(dict(reversed(content.items())), indent=4), encoding="utf-8")
    assert load_tokenizer(folder).fingerprint == before


def test_fingerprint_changes_with_a_merge(folder: Path) -> None:
    before = load_tokenizer(folder).fingerprint
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(folder).fingerprint != before


def test_survives_pickling(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    copy: Tokenizer = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.fingerprint, copy.num_tokens, copy.mask_id) == (
        tokenizer.fingerprint,
        tokenizer.num_tokens,
        tokenizer.mask_id,
    )
    assert copy.backend.encode("some text").ids == tokenizer.backend.encode("some text").ids


def test_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, lmssl.tokenizer.load, lmssl.tokenizer.encode, lmssl.tokenizer.train as t; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(done.stdout.split())


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such tokenizer folder"):
        load_tokenizer(tmp_path / "absent")


def test_missing_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ['{"model": ', "[1, 2]", "\x00"])
def test_malformed_json(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    if name == "special_tokens_map.json":
        change(folder / "tokenizer_config.json", cls_token=None)  # the map is read for what the config leaves open
    with pytest.raises(TokenizerError, match=name) as caught:
        load_tokenizer(folder)
    assert caught.value.where == str(folder / name)


def test_json_that_is_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(TokenizerError, match="is not a tokenizer"):
        load_tokenizer(folder)


def test_no_tokens_at_all(folder: Path) -> None:
    content = {"model": {"type": "BPE", "vocab": {}, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TokenizerError, match="no tokens"):
        load_tokenizer(folder)


def test_control_token_absent_from_the_vocabulary(folder: Path) -> None:
    change(folder / "tokenizer_config.json", mask_token="<mask>")
    with pytest.raises(TokenizerError, match="mask_token '<mask>' is not in the vocabulary"):
        load_tokenizer(folder)
