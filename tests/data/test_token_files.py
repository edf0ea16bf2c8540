import ast
import importlib
import re
import struct
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmssl.data.cache import ChunkCache
from lmssl.data.corpus import list_units, read_texts
from lmssl.data.records import Part, TokenFormat
from lmssl.data.token_files import list_ranges, open_tokens, read_documents, tokenizer_name
from lmssl.errors import DataError
from lmssl.recipe.data import TokensCorpus
from lmssl.tokenizer.load import Tokenizer

EOS = 1
Documents = list[list[int]]


def write_ds(path: Path, documents: Sequence[Sequence[int]], size: int = 2, metadata: bool = True) -> Path:
    ends = np.cumsum([len(ids) for ids in documents])
    path.write_bytes(np.array([i for ids in documents for i in ids], f"<u{size}").tobytes())
    Path(f"{path}.index").write_bytes(ends.astype("<u8").tobytes())
    if metadata:
        Path(f"{path}.metadata").write_text(f"some/tokenizer|{size}\n{ends[-1]}\n{ends[-1]} T")
    return path


def write_megatron(
    path: Path, documents: Sequence[Sequence[int]], code: int = 8, pieces: int = 1, tail: bytes = b""
) -> Path:
    """As the format is documented: header, lengths, byte offsets, bounds; `pieces` sequences make one document."""
    dtype = {1: "u1", 4: "<i4", 5: "<i8", 8: "<u2"}[code]
    sequences = [part.tolist() for ids in documents for part in np.array_split(np.array(ids, int), pieces)]
    lengths = [len(ids) for ids in sequences]
    size = np.dtype(dtype).itemsize
    starts = [size * sum(lengths[:i]) for i in range(len(lengths))]
    bounds = [pieces * i for i in range(len(documents) + 1)]
    path.write_bytes(np.array([i for ids in sequences for i in ids], dtype).tobytes())
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(bounds))
    columns = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(starts)}q", *starts)
    path.with_suffix(".idx").write_bytes(header + columns + struct.pack(f"<{len(bounds)}q", *bounds) + tail)
    return path


WRITERS: dict[str, Callable[[Path, Documents], Path]] = {
    "ds u16": lambda folder, documents: write_ds(folder / "a.ds", documents),
    "ds u32": lambda folder, documents: write_ds(folder / "a.ds", documents, 4, metadata=False),
    "megatron u16": lambda folder, documents: write_megatron(folder / "a.bin", documents),
    "megatron i32": lambda folder, documents: write_megatron(folder / "a.bin", documents, 4, pieces=3),
    "megatron i64": lambda folder, documents: write_megatron(folder / "a.bin", documents, 5, tail=b"\0" * 7),
}


@pytest.fixture
def documents() -> Documents:
    draw = np.random.default_rng(3)
    return [draw.integers(3, 250, draw.integers(1, 90)).tolist() for _ in range(200)]


def tokens_corpus(path: Path | str, **fields: Any) -> TokensCorpus:
    return TokensCorpus(name="ready", kind="tokens", path=str(path), **fields)


def read_all(path: Path, eos: Any = "auto", num_ids: int = 300, count: int = 1) -> tuple[Documents, list[int], int]:
    found, numbers, num_empty = [], [], 0
    for part, _ in list_ranges(str(path), lambda size: count):
        read = read_documents(TokenFormat("tokens", ends_with_eos=eos), part, num_ids, EOS)
        found += [ids.tolist() for ids in np.split(read.ids, read.ends[:-1])] if len(read.ends) else []
        numbers += read.numbers.tolist()
        num_empty += read.num_empty
    return found, numbers, num_empty


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_ranges_tile_the_documents(tmp_path: Path, documents: Documents, writer: str, count: int) -> None:
    path = WRITERS[writer](tmp_path, documents)
    ranges = list_ranges(str(path), lambda size: count)
    assert len(ranges) == min(count, len(documents)) if count < 1000 else len(ranges) > 100
    assert sum(size for _, size in ranges) == 4 * sum(map(len, documents))
    assert read_all(path, count=count) == (documents, list(range(200)), 0)


@pytest.mark.parametrize("writer", WRITERS)
def test_one_eos_is_taken_off(tmp_path: Path, documents: Documents, writer: str) -> None:
    closed = [[*ids, EOS] for ids in documents]
    assert read_all(WRITERS[writer](tmp_path, closed), count=5)[0] == documents
    assert read_all(WRITERS[writer](tmp_path, closed), True)[0] == documents
    assert read_all(WRITERS[writer](tmp_path, closed), False)[0] == closed
    mixed = [[5, EOS, EOS], [EOS], [6, EOS, 7], [8]]
    assert read_all(WRITERS[writer](tmp_path, mixed)) == ([[5, EOS], [6, EOS, 7], [8]], [0, 2, 3], 1)


def test_documents_without_the_promised_eos(tmp_path: Path) -> None:
    path = write_ds(tmp_path / "a.ds", [[5, EOS], [6], [7, EOS]])
    with pytest.raises(DataError, match="does not end with the eos token, id 1") as caught:
        read_all(path, True)
    assert caught.value.where == f"{path}, document 1" and "auto" in str(caught.value)
    with pytest.raises(DataError, match="the tokenizer has no eos token"):
        read_documents(TokenFormat("tokens", ends_with_eos=True), list_ranges(str(path), lambda n: 1)[0][0], 300, None)


@pytest.mark.parametrize("writer", WRITERS)
def test_empty_documents_are_counted(tmp_path: Path, writer: str) -> None:
    path = WRITERS[writer](tmp_path, [[], [5], [], [], [6, 7], []])
    assert read_all(path, count=3) == ([[5], [6, 7]], [1, 4], 4)


@pytest.mark.parametrize(("writer", "wrong"), [("ds u16", 300), ("ds u32", 70_000), ("megatron i32", -1)])
def test_an_id_the_tokenizer_does_not_have(tmp_path: Path, documents: Documents, writer: str, wrong: int) -> None:
    documents[120][0] = wrong
    path = WRITERS[writer](tmp_path, documents)
    with pytest.raises(DataError, match=f"id {wrong} is not one of the tokenizer's 300") as caught:
        read_all(path, count=7)
    assert caught.value.where == f"{path}, document 120" and "tokenizer" in str(caught.value.remedy)


def _cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def _patch(path: Path, at: int, new: bytes) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + new + raw[at + len(new) :])


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated ds": ("ds u16", lambda d: _cut(d / "a.ds", 2), "bytes, and its index of"),
    "ds of half a token": ("ds u32", lambda d: _cut(d / "a.ds", 1), "bytes, and its index of"),
    "truncated index": ("ds u16", lambda d: _cut(d / "a.ds.index", 8), "bytes, and its index of"),
    "half a number": ("ds u16", lambda d: _cut(d / "a.ds.index", 3), "whole u64 numbers"),
    "no index": ("ds u16", lambda d: (d / "a.ds.index").unlink(), "has no index"),
    "descending index": ("ds u16", lambda d: _patch(d / "a.ds.index", 8, b"\xff" * 7), "does not ascend"),
    "strange metadata": ("ds u16", lambda d: Path(d / "a.ds.metadata").write_text("x|8\n"), "bytes of a token"),
    "truncated bin": ("megatron u16", lambda d: _cut(d / "a.bin", 2), "its index ends at"),
    "truncated idx": ("megatron u16", lambda d: _cut(d / "a.idx", 8), "its header means at least"),
    "a piece of an idx": ("megatron u16", lambda d: (d / "a.idx").write_bytes(b"MMIDIDX"), "MMIDIDX"),
    "no idx": ("megatron u16", lambda d: (d / "a.idx").unlink(), "has no index"),
    "other magic": ("megatron u16", lambda d: _patch(d / "a.idx", 0, b"TNTIDX"), "MMIDIDX"),
    "floats": ("megatron u16", lambda d: _patch(d / "a.idx", 17, b"\x06"), "version 1 with token type 6"),
    "version 2": ("megatron u16", lambda d: _patch(d / "a.idx", 9, b"\x02"), "version 2 with token type 8"),
    "a gap": ("megatron u16", lambda d: _patch(d / "a.idx", 34, b"\x07\0\0\0"), "do not follow each other"),
    "bounds": ("megatron u16", lambda d: _patch(d / "a.idx", 34 + 12 * 200 + 80, b"\xff\xff\xff"), "not sequences of"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path: Path, documents: Documents, damage: str) -> None:
    writer, harm, reason = DAMAGE[damage]
    path = WRITERS[writer](tmp_path, documents)
    harm(tmp_path)
    with pytest.raises(DataError, match=reason) as caught:
        read_all(path, count=3)
    assert str(caught.value.where).startswith(str(path.with_suffix(""))) and caught.value.remedy


def test_a_file_that_changed_after_it_was_listed(tmp_path: Path, documents: Documents) -> None:
    path = write_ds(tmp_path / "a.ds", documents)
    ((part, _),) = list_ranges(str(path), lambda size: 1)
    write_ds(path, documents[1:])
    with pytest.raises(DataError, match="changed after the corpus was listed"):
        read_documents(TokenFormat("tokens"), part, 300, EOS)


def test_a_file_without_documents(tmp_path: Path) -> None:
    for name in ("a.ds", "a.ds.index"):
        (tmp_path / name).touch()
    assert list_ranges(str(tmp_path / "a.ds"), lambda size: 1) == []
    with pytest.raises(DataError, match="holds no text"):
        list_units(tokens_corpus(tmp_path))


def test_folders_and_patterns_skip_what_lies_beside(tmp_path: Path, documents: Documents) -> None:
    write_ds(tmp_path / "a.ds", documents)
    write_megatron(tmp_path / "b.bin", documents)
    for path in (tmp_path, tmp_path / "*"):
        units = list_units(tokens_corpus(path))
        assert sorted({Path(part.path).name for unit in units for part in unit.parts}) == ["a.ds", "b.bin"]


def test_units_are_ranges_of_documents(tmp_path: Path, documents: Documents) -> None:
    path = write_ds(tmp_path / "a.ds", documents)
    units = list_units(tokens_corpus(path), chunk_bytes=4096)
    parts = [part for unit in units for part in unit.parts]
    assert len(units) == round(4 * sum(map(len, documents)) / 4096)
    assert parts[0].start == 0 and parts[-1].stop == 200
    assert all(a.stop == b.start for a, b in pairwise(parts))


@pytest.fixture
def cache(tmp_path: Path, tokenizer: Tokenizer) -> ChunkCache:
    return ChunkCache(tmp_path / "cache", tokenizer, max_bad_records=0, report=print, cancelled=lambda: False)


def test_chunks_hold_the_documents_and_where_they_come_from(
    tmp_path: Path, documents: Documents, cache: ChunkCache
) -> None:
    write_ds(tmp_path / "a.ds", documents[:120])
    write_megatron(tmp_path / "b.bin", [*documents[120:], [], documents[0]], 4)
    (unit,) = list_units(tokens_corpus(tmp_path))
    chunk = cache.get(unit, 0)
    rows, ends = chunk.documents(), chunk.ends().astype(int)
    assert [ids.tolist() for ids in np.split(chunk.tokens(), ends[:-1])] == [*documents, documents[0]]
    assert rows["part"].tolist() == [0] * 120 + [1] * 81
    assert rows["record"].tolist() == rows["start"].tolist() == [*range(120), *range(80), 81]
    assert (chunk.meta.num_bytes, chunk.meta.num_empty, chunk.meta.dtype) == (0, 1, "<u2")
    # The hash is of the ids, not of the bytes that a file spends on them.
    assert rows["text_hash"][0] == rows["text_hash"][-1] != rows["text_hash"][1]


def test_the_eos_token_decides_the_chunk(tmp_path: Path, tokenizer: Tokenizer, cache: ChunkCache) -> None:
    from dataclasses import replace

    write_ds(tmp_path / "a.ds", [[5, EOS]])
    (unit,) = list_units(tokens_corpus(tmp_path))
    other = ChunkCache(
        tmp_path / "cache", replace(tokenizer, eos_id=None), max_bad_records=0, report=print, cancelled=lambda: False
    )
    assert (cache.get(unit, 0).meta.num_tokens, other.get(unit, 0).meta.num_tokens) == (1, 2)


def test_ready_made_tokens_give_the_same_sequences_as_their_text(
    open_stream: Any, jsonl: Any, tokenizer: Tokenizer, tmp_path: Path, texts: Any
) -> None:
    encoded = [[*tokenizer.backend.encode(text, add_special_tokens=False).ids, tokenizer.eos_id] for text in texts(200)]
    path = write_ds(tmp_path / "a.ds", encoded)
    fields: dict[str, Any] = {"chunk_bytes": 1 << 24, "validation": None}
    ready, text = open_stream(tokens_corpus(path), **fields), open_stream(jsonl("ready", count=200), **fields)
    count = ready.num_sequences_per_epoch()["ready"]
    assert count == text.num_sequences_per_epoch()["ready"]
    for position in range(2 * count):
        assert np.array_equal(ready.sequence(position).ids_T, text.sequence(position).ids_T)


def test_the_split_holds_out_documents_of_tokens(open_stream: Any, tmp_path: Path, documents: Documents) -> None:
    write_ds(tmp_path / "a.ds", documents + documents)
    stream = open_stream(tokens_corpus(tmp_path / "a.ds"), validation={"ratio": 0.2, "tokens": 10**6})
    (split,) = stream.validation()
    assert split.window.num_documents % 2 == 0 and 40 < split.window.num_documents < 130
    assert split.num_bytes == 0


def test_a_ledger_continues_over_tokens(open_stream: Any, tmp_path: Path, documents: Documents) -> None:
    path = write_ds(tmp_path / "a.ds", documents)
    stream = open_stream(tokens_corpus(path), chunk_bytes=1024)
    rows = [stream.sequence(position).ids_T for position in range(60)]
    again = open_stream(tokens_corpus(path), chunk_bytes=1024, ledger=stream.ledger, cache="other")
    assert all(np.array_equal(again.sequence(position).ids_T, rows[position]) for position in (59, 3, 30))
    with pytest.raises(DataError, match="the files of corpus 'ready' decides the order"):
        open_stream(tokens_corpus(path, ends_with_eos=False), chunk_bytes=1024, ledger=stream.ledger)
    write_ds(path, [[*ids[:-1], 9] for ids in documents])
    with pytest.raises(DataError, match="text of corpus 'ready' changed since"):
        open_stream(tokens_corpus(path), chunk_bytes=1024, ledger=stream.ledger)


def test_the_tokenizer_they_were_made_with_is_reported(open_stream: Any, tmp_path: Path, documents: Documents) -> None:
    path = write_ds(tmp_path / "a.ds", documents)
    lines: list[str] = []
    open_stream(tokens_corpus(path), report=lines.append)
    (line,) = lines
    assert "corpus 'ready'" in line and "some/tokenizer" in line
    assert tokenizer_name(str(path)) == "some/tokenizer"
    Path(f"{path}.metadata").write_text("Unknown Tokenizer|2|2\n1\n")
    assert tokenizer_name(str(path)) is None


def test_tokens_have_no_text(tmp_path: Path, documents: Documents) -> None:
    write_ds(tmp_path / "a.ds", documents)
    with pytest.raises(DataError, match="holds tokens, and text is needed here"):
        next(read_texts([tokens_corpus(tmp_path)]))


def test_tokens_cannot_be_decontaminated(open_stream: Any, tmp_path: Path, documents: Documents) -> None:
    write_ds(tmp_path / "a.ds", documents)
    (tmp_path / "test.txt").write_text("a question of many words that nobody must see in training, or else")
    filters = {"decontaminate": {"path": str(tmp_path / "test.txt"), "ngram": 5}}
    with pytest.raises(DataError, match="cannot be compared with evaluation text") as caught:
        open_stream(tokens_corpus(tmp_path / "a.ds"), filters=filters).sequence(0)
    assert caught.value.where == "data.filters.decontaminate, corpus 'ready'"


def test_the_guide_names_what_datatrove_has(root: Path) -> None:
    pytest.importorskip("datatrove")
    blocks = re.findall(r"^```python\n(.*?)^```", (root / "docs" / "data.md").read_text(encoding="utf-8"), re.M | re.S)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    names = {(node.module or "", alias.name) for node in nodes for alias in node.names}
    assert {name for _, name in names} >= {"MinhashDedupSignature", "GopherQualityFilter", "DocumentTokenizer"}
    assert [name for module, name in names if not hasattr(importlib.import_module(module), name)] == []


@pytest.mark.parametrize("shuffle", [False, True])
def test_files_that_datatrove_wrote(
    tmp_path: Path, tokenizer: Tokenizer, texts: Any, open_stream: Any, shuffle: bool
) -> None:
    pytest.importorskip("datatrove")
    from datatrove.data import Document
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.tokens import DocumentTokenizer

    writer = DocumentTokenizer(
        str(tmp_path / "tokenized"),
        str(tokenizer.path / "tokenizer.json"),
        eos_token="<eos>",
        shuffle_documents=shuffle,
        seed=1,
    )
    LocalPipelineExecutor(
        pipeline=[[Document(text=text, id=text[:6]) for text in texts(100)], writer],
        tasks=1,
        logging_dir=str(tmp_path / "logs"),
    ).run()
    (path,) = (tmp_path / "tokenized").glob("*.ds")
    expected = [tokenizer.backend.encode(text, add_special_tokens=False).ids for text in texts(100)]
    assert sorted(read_all(path)[0]) == sorted(expected)
    assert sorted(read_all(path, True)[0]) == sorted(expected)
    assert tokenizer_name(str(path)) == str(tokenizer.path / "tokenizer.json")
    stream = open_stream(tokens_corpus(tmp_path / "tokenized"), validation=None)
    assert stream.num_sequences_per_epoch()["ready"] > 10


def test_files_that_datatrove_wrote_for_megatron(tmp_path: Path, tokenizer: Tokenizer, texts: Any) -> None:
    pytest.importorskip("datatrove")
    from datatrove.data import Document
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    writer = MegatronDocumentTokenizer(
        str(tmp_path / "out"),
        save_filename="x",
        tokenizer_name_or_path=str(tokenizer.path / "tokenizer.json"),
        eos_token="<eos>",
    )
    writer.run([Document(text=text, id=text[:6]) for text in texts(100)])
    (path,) = (tmp_path / "out").glob("*.bin")
    expected = [tokenizer.backend.encode(text, add_special_tokens=False).ids for text in texts(100)]
    assert read_all(path, count=4)[0] == expected


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        open_tokens(str(tmp_path / "a.ds"))
    with pytest.raises(DataError, match="cannot be read"):
        read_documents(TokenFormat("tokens"), Part(str(tmp_path / "a.bin"), ""), 300, None)
