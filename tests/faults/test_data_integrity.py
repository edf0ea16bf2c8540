"""Damaged, changed, removed and added data: each is detected and named, never silent."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from lmssl import cli
from lmssl.data.ledger import Ledger
from lmssl.data.stream import SequenceStream
from lmssl.errors import DataError
from lmssl.recipe.data import DataSection, JsonlCorpus, ParquetCorpus
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from runs import metrics, small_recipe, write_recipe

DRAW = np.random.default_rng(5)
TEXTS = [f"{i} " + " ".join(map(str, DRAW.integers(0, 10**6, 60))) for i in range(400)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Tokenizer:
    return load_tokenizer(root / "tokenizer" / "bpe-4k")


@pytest.fixture
def open_stream(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., SequenceStream]:
    def build(
        corpus: Any, ledger: Ledger | None = None, report: Callable[[str], None] | None = None, **fields: Any
    ) -> SequenceStream:
        small: dict[str, Any] = {"sequence_length": 64, "chunk_bytes": 16_384, "window_chunks": 4, "validation": None}
        section = DataSection(mixture=(corpus,), **{**small, **fields})
        return SequenceStream.open(section, tokenizer, 1, tmp_path / "cache", ledger, report)

    return build


def write(path: Path) -> Any:
    """A corpus of one file of the kind that its name says."""
    name = path.name
    if name.endswith(".parquet"):
        parquet.write_table(pa.table({"text": TEXTS}), path, row_group_size=100)
        return ParquetCorpus(name="c", kind="parquet", path=str(path))
    pack: Callable[[bytes], bytes] = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(
        name.rpartition(".")[2], bytes
    )
    path.write_bytes(pack(LINES))
    return JsonlCorpus(name="c", kind="jsonl", path=str(path))


def read_epoch(stream: SequenceStream) -> list[list[int]]:
    return [stream.sequence(p).ids_T.tolist() for p in range(stream.num_sequences_per_epoch()["c"])]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("keep", [0.2, 0.9, -1])
def test_a_truncated_file(tmp_path: Path, open_stream: Any, name: str, keep: float) -> None:
    corpus = write(tmp_path / name)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[: -1 if keep < 0 else int(len(raw) * keep)])
    with pytest.raises(DataError, match="truncated or corrupt") as caught:
        read_epoch(open_stream(corpus))
    assert caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_flipped_bit_in_an_archive(tmp_path: Path, open_stream: Any, name: str) -> None:
    corpus = write(tmp_path / name)
    if name.endswith("zst"):  # zstd detects it only in frames that carry a checksum
        (tmp_path / name).write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(LINES))
    raw = bytearray((tmp_path / name).read_bytes())
    raw[len(raw) // 2] ^= 16
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        read_epoch(open_stream(corpus, max_bad_records=10**6))
    assert caught.value.where == str(tmp_path / name)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["tokens.ds", "tokens.ds.index", "documents.npy"])
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_a_flipped_bit_in_a_cached_chunk(tmp_path: Path, open_stream: Any, name: str, at: float) -> None:
    corpus = write(tmp_path / "a.jsonl")
    rows = read_epoch(open_stream(corpus))
    chunks = sorted((tmp_path / "cache" / "chunks").glob("*/*"))
    assert len(chunks) > 4
    path = chunks[2] / name
    flip(path, int((path.stat().st_size - 1) * at))
    lines: list[str] = []
    assert read_epoch(open_stream(corpus, report=lines.append)) == rows
    assert lines == [f"cached chunk {chunks[2]} is damaged; building it again"]


def test_a_chunk_that_vanishes_while_a_run_reads(tmp_path: Path, open_stream: Any) -> None:
    corpus = write(tmp_path / "a.jsonl")
    stream = open_stream(corpus)
    stream.build_ahead(0)
    shutil.rmtree(tmp_path / "cache" / "chunks")
    with pytest.raises(DataError, match="removed or damaged during the run"):
        stream.sequence(0)


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return harm


def swap(folder: Path) -> None:
    """The sum of the sizes and the names stay."""
    longer, shorter = ((folder / name).read_bytes() for name in ("2.jsonl", "3.jsonl"))
    assert len(longer) != len(shorter)
    (folder / "2.jsonl").write_bytes(shorter)
    (folder / "3.jsonl").write_bytes(longer)


OTHER, FILES = "the text of corpus 'c' changed since the run began", "the files of corpus 'c' are not those"
CHANGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "other content of the same size": (rewrite("2.jsonl", lambda raw: raw.replace(b"1", b"7")), OTHER, "2.jsonl"),
    "one byte in the middle": (
        rewrite("2.jsonl", lambda raw: raw[: len(raw) // 2] + b"0" + raw[len(raw) // 2 + 1 :]),
        OTHER,
        "2.jsonl",
    ),
    "longer": (rewrite("2.jsonl", lambda raw: raw + b'{"text": "x"}\n'), OTHER, "2.jsonl"),
    "sizes swapped": (swap, OTHER, "2.jsonl, 3.jsonl"),
    "removed": (lambda folder: (folder / "2.jsonl").unlink(), FILES, "gone: 2.jsonl"),
    "added": (lambda folder: (folder / "9.jsonl").write_bytes(b'{"text": "x"}\n'), FILES, "new: 9.jsonl"),
    "renamed": (lambda folder: (folder / "2.jsonl").rename(folder / "8.jsonl"), FILES, "gone: 2.jsonl; new: 8.jsonl"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five files of a corpus, each of several chunks."""
    folder = tmp_path / "c"
    folder.mkdir()
    for number in range(5):
        rows = LINES.splitlines(keepends=True)[number * 80 : number * 80 + 80]
        (folder / f"{number}.jsonl").write_bytes(b"".join(rows))
    return folder


@pytest.mark.parametrize("reach", ["whole", "first window", "nothing"])
@pytest.mark.parametrize("change", CHANGES)
def test_files_that_changed_since_the_run_began(
    tmp_path: Path, open_stream: Any, folder: Path, change: str, reach: str
) -> None:
    """Whether the run has come to the file or not."""
    corpus = JsonlCorpus(name="c", kind="jsonl", path=str(folder))
    first = open_stream(corpus)
    if reach == "whole":
        read_epoch(first)
    elif reach == "first window":
        first.sequence(0)
        assert not first.ledger.entries("c")[-1].ends_epoch
    first.ledger.save(tmp_path / "ledger.jsonl")
    harm, reason, named = CHANGES[change]
    harm(folder)
    with pytest.raises(DataError, match=reason) as caught:
        open_stream(corpus, ledger=Ledger.load(tmp_path / "ledger.jsonl"))
    assert str(caught.value.where).replace(f"{folder}/", "") == named and caught.value.remedy


def test_files_that_are_the_same_under_other_times_and_folders(tmp_path: Path, open_stream: Any, folder: Path) -> None:
    first = open_stream(JsonlCorpus(name="c", kind="jsonl", path=str(folder)))
    first.sequence(0)
    shutil.copytree(folder, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, ns=(5, 5))
    moved = open_stream(JsonlCorpus(name="c", kind="jsonl", path=str(tmp_path / "copy")), ledger=first.ledger)
    assert read_epoch(moved) == read_epoch(first)


def test_a_ledger_from_before_there_were_marks(tmp_path: Path, open_stream: Any, folder: Path) -> None:
    """Its run continues, and what changed is found by the checksum of its window, if the run came to it."""
    corpus = JsonlCorpus(name="c", kind="jsonl", path=str(folder))
    first = open_stream(corpus)
    rows = read_epoch(first)
    first.ledger.save(tmp_path / "ledger.jsonl")
    about, *entries = (tmp_path / "ledger.jsonl").read_text().splitlines(keepends=True)
    old = {key: value for key, value in json.loads(about).items() if key != "files"}
    (tmp_path / "ledger.jsonl").write_text(json.dumps(old) + "\n" + "".join(entries))
    assert read_epoch(open_stream(corpus, ledger=Ledger.load(tmp_path / "ledger.jsonl"))) == rows
    CHANGES["other content of the same size"][0](folder)
    with pytest.raises(DataError, match="changed since the run's last checkpoint"):
        read_epoch(open_stream(corpus, ledger=Ledger.load(tmp_path / "ledger.jsonl")))


@pytest.mark.parametrize("change", ["content", "removed"])
def test_a_file_that_changes_while_the_run_goes_on(tmp_path: Path, open_stream: Any, change: str) -> None:
    corpus = write(tmp_path / "a.jsonl")
    stream = open_stream(corpus)
    stream.sequence(0)
    if change == "removed":
        (tmp_path / "a.jsonl").unlink()
    else:
        (tmp_path / "a.jsonl").write_bytes(LINES.replace(b"1", b"7"))
        os.utime(tmp_path / "a.jsonl", ns=(5, 5))
    reason = "changed after the corpus was listed" if change == "content" else "cannot be read"
    with pytest.raises(DataError, match=reason) as caught:
        read_epoch(stream)
    assert caught.value.where == str(tmp_path / "a.jsonl")


def test_the_command_line_names_a_truncated_archive(
    tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl.gz"
    write(path)
    path.write_bytes(path.read_bytes()[:-20])
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache")
    recipe["data"]["mixture"] = [{"name": "c", "kind": "jsonl", "path": str(path)}]
    assert cli.main(["train", str(write_recipe(tmp_path / "recipe.yaml", recipe))]) == 3
    said = capsys.readouterr().err
    assert "truncated or corrupt" in said and str(path) in said


def test_a_run_lists_its_bad_records(tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + b'{"text": 7}\nnot json\n')
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=2)
    recipe["data"] |= {"mixture": [{"name": "c", "kind": "jsonl", "path": str(path)}], "validation": None}
    assert cli.main(["train", str(write_recipe(tmp_path / "recipe.yaml", recipe))]) == 0
    listed = tmp_path / "run" / "bad_records.jsonl"
    found = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    assert [(one["file"], one["record"], one["start"]) for one in found] == [
        (str(path), 400, len(LINES)),
        (str(path), 401, len(LINES) + 12),
    ]
    assert "int instead of text" in found[0]["reason"] and "not JSON" in found[1]["reason"]
    assert f"2 bad records are listed in {listed}" in capsys.readouterr().out


def test_a_mixture_with_ready_made_tokens_claims_no_bits_per_byte(tmp_path: Path, text_folder: Path) -> None:
    ids = DRAW.integers(10, 4000, 20_000)
    ids.astype("<u2").tofile(tmp_path / "a.ds")
    np.arange(100, 20_001, 100).astype("<u8").tofile(tmp_path / "a.ds.index")
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=2)
    recipe["data"]["mixture"][0]["weight"] = 0.5
    recipe["data"]["mixture"].append({"name": "c", "kind": "tokens", "path": str(tmp_path / "a.ds"), "weight": 0.5})
    assert cli.main(["train", str(write_recipe(tmp_path / "recipe.yaml", recipe))]) == 0
    rows = metrics(tmp_path / "run")
    assert {row["bits_per_byte"] for row in rows} == {None} and all(row["loss"] > 0 for row in rows)
    corpora = next(row["corpora"] for row in rows if row["kind"] == "evaluate")
    assert corpora["c"]["bits_per_byte"] is None and corpora["text"]["bits_per_byte"] > 0
