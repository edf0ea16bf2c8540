from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard

from lmssl.errors import DataError
from lmssl.finetune.rows import example, read_examples, read_rows
from lmssl.finetune.task import Classification, Instructions, Regression, Tokens

CLASSES = Classification(kind="classification")
PAIRS = Classification(kind="classification", text="a", pair="b")
NUMBERS = Regression(kind="regression")
WORDS = Tokens(kind="tokens")
PROMPTS = Instructions(kind="instructions")
CHATS = Instructions(kind="instructions", messages="messages")


def test_tables_and_lines_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [("he said 'no', \"so\"", "1"), ("naïve\tcafé 漢字", "0")]
    lines = "".join(json.dumps({"text": text, "label": int(label)}) + "\n\n" for text, label in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "a.csv").write_text(
        'text,label\r\n"he said \'no\', ""so""",1\r\nnaïve\tcafé 漢字,0\r\n', encoding="utf-8"
    )
    found = {
        path.name: [(e.given, e.answer) for e in read_examples(path, CLASSES)] for path in sorted(tmp_path.iterdir())
    }
    assert len(found) == 4
    assert all(value == rows for value in found.values())


def test_glue_tables_quote_nothing(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text('text\tlabel\n"a lone mark\t1\nanother "\t0\n', encoding="utf-8")
    assert [e.given for e in read_examples(path, CLASSES)] == ['"a lone mark', 'another "']


def test_a_datasets_folder_gives_names_for_its_numbers(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).save_to_disk(tmp_path / "one")
    assert [e.answer for e in read_examples(tmp_path / "one", CLASSES)] == ["yes", "no"]
    both = datasets.DatasetDict({"train": datasets.load_from_disk(str(tmp_path / "one"))})
    both.save_to_disk(tmp_path / "both")
    assert [e.answer for e in read_examples(tmp_path / "both/train", CLASSES)] == ["yes", "no"]
    with pytest.raises(DataError, match=r"(?s)several splits.*both/train"):
        list(read_rows(tmp_path / "both"))
    with pytest.raises(DataError, match="save_to_disk"):
        list(read_rows(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', r"(?s)not JSON.*line 2"),
        ("a.jsonl", b"[1]\n", "no JSON object"),
        ("a.jsonl", b"\n", "no rows"),
        ("a.csv", b"text,label\na,1,2\n", r"(?s)3 cells and the header 2.*line 2"),
        ("a.csv", b"text,text\na,1\n", "two columns are called 'text'"),
        ("a.csv", b"text,label\n\xff,1\n", "cannot be read"),
        ("a.csv", b'text,label\n"a"b,1\n', "cannot be read"),
        ("a.parquet", b"PAR1", "no kind of table"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a", "label": 1}\n' * 99, mtime=0)[:-9], "cut short"),
        ("a.jsonl.zst", zstandard.compress(bytes(range(256)) * 99)[:-9], "cut short"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_examples(tmp_path / name, CLASSES)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl"):
        list(read_rows(tmp_path / "trian.jsonl"))


@pytest.mark.parametrize(
    ("row", "asked", "message"),
    [
        ({"txt": "a", "label": 1}, CLASSES, r"(?s)no field 'text'.*fields are txt, label.*did you mean txt"),
        ({"text": "a"}, CLASSES, "no field 'label'"),
        ({"text": "a", "label": None}, CLASSES, "'label' is empty"),
        ({"text": "  ", "label": 1}, CLASSES, "must be text"),
        ({"text": 3, "label": 1}, CLASSES, "must be text"),
        ({"text": "a", "label": 0.5}, CLASSES, "regression"),
        ({"text": "a", "label": [1]}, CLASSES, "must be a label"),
        ({"a": "x", "label": 1}, PAIRS, "no field 'b'"),
        ({"text": "a", "label": "much"}, NUMBERS, "must be a number"),
        ({"text": "a", "label": "nan"}, NUMBERS, "must be a number"),
        ({"words": ["a", "b"], "tags": ["X"]}, WORDS, "2 words have 1 tags"),
        ({"words": ["a", " "], "tags": ["X", "Y"]}, WORDS, "none of them empty"),
        ({"words": [], "tags": []}, WORDS, "0 words"),
        ({"words": {"a": 1}, "tags": []}, WORDS, "must be a list"),
        ({"prompt": "a"}, PROMPTS, "no field 'completion'"),
        ({"messages": [{"role": "user", "content": "a"}]}, CHATS, "the last by the assistant"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, CHATS, "at least two"),
    ],
)
def test_rows_that_lack_something(row: dict[str, Any], asked: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        example(row, asked, "x.jsonl, line 7")
    assert "line 7" in str(error.value)


def test_what_each_kind_makes_of_a_row() -> None:
    assert example({"a": "x", "b": "y", "label": True}, PAIRS, "").given == ("x", "y")
    assert example({"text": "x", "label": 3.0}, CLASSES, "").answer == "3"
    assert example({"text": "x", "label": "2.5"}, NUMBERS, "").answer == 2.5
    assert example({"words": "a b", "tags": "X Y"}, WORDS, "").answer == ("X", "Y")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = example({"messages": chat}, CHATS, "")
    assert (found.given, found.answer) == ((chat[0],), "b")
