import errno
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmssl.data import cache as cache_module
from lmssl.data import cancel as cancel_module
from lmssl.data import chunk as module
from lmssl.data.cache import ChunkCache
from lmssl.data.cancel import Cancelled
from lmssl.data.chunk import Chunk, bad_records, read_chunk, text_hash
from lmssl.data.corpus import Unit, list_units
from lmssl.errors import DataError
from lmssl.recipe.data import JsonlCorpus, TextCorpus
from lmssl.tokenizer.encode import Encoder
from lmssl.tokenizer.load import Tokenizer


def content(chunk: Chunk) -> list[list[int]]:
    ends = chunk.ends().astype(int).tolist()
    return [chunk.tokens()[a:b].tolist() for a, b in zip([0, *ends], ends, strict=False)]


def test_a_chunk_holds_tokens_and_sources(
    open_cache: Any, unit: Unit, texts: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    chunk = open_cache().get(unit, 0)
    assert content(chunk) == [tokenizer.backend.encode(text).ids for text in texts(50)]
    assert chunk.tokens().dtype == np.uint16
    rows = chunk.documents()
    file = Path(chunk.meta.sources[0]).read_bytes()
    assert [json.loads(file[row["start"] :].splitlines()[0])["text"] for row in rows] == texts(50)
    assert rows["num_bytes"].tolist() == [len(text.encode()) for text in texts(50)]
    assert rows["text_hash"].tolist() == [text_hash(text) for text in texts(50)]
    assert rows["record"].tolist() == list(range(50))
    assert (chunk.meta.num_documents, chunk.meta.is_last) == (50, True)
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


def test_parts_of_long_documents_do_not_show(
    open_cache: Any, unit: Unit, texts: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Encoder.encode_utf8
    calls: list[int] = []
    monkeypatch.setattr(module, "_BATCH_BYTES", 60)
    monkeypatch.setattr(Encoder, "encode_utf8", lambda self, raws: calls.append(len(raws)) or encode(self, raws))
    chunk = open_cache().get(unit, 0)
    assert max(len(text.encode()) for text in texts(50)) > 180 and len(calls) > 50, "most documents are several parts"
    assert content(chunk) == [tokenizer.backend.encode(text).ids for text in texts(50)]


def test_large_vocabularies_take_four_bytes(open_cache: Any, unit: Unit, tokenizer: Tokenizer, tmp_path: Path) -> None:
    wide = replace(tokenizer, num_tokens=65_537, fingerprint="wide")
    cache = ChunkCache(tmp_path / "c", wide, max_bad_records=0, report=print, cancelled=lambda: False)
    chunk = cache.get(unit, 0)
    assert chunk.tokens().dtype == np.uint32
    assert content(chunk) == content(open_cache().get(unit, 0))


def test_a_chunk_is_built_once(open_cache: Any, unit: Unit) -> None:
    chunk = open_cache().get(unit, 0)
    stamp = (chunk.path / "meta.json").stat().st_mtime_ns
    assert open_cache().get(unit, 0) == chunk
    assert (chunk.path / "meta.json").stat().st_mtime_ns == stamp


def test_the_same_content_has_the_same_checksum_elsewhere(open_cache: Any, jsonl: Any, tmp_path: Path) -> None:
    corpus = jsonl(count=50)
    first = open_cache().get(list_units(corpus)[0], 0)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(corpus.path).read_bytes())
    second = open_cache().get(list_units(JsonlCorpus(name="other", kind="jsonl", path=str(copy)))[0], 0)
    assert first.path != second.path and first.meta.checksum == second.meta.checksum
    os.utime(corpus.path, ns=(1, 1))
    touched = open_cache().get(list_units(corpus)[0], 0)
    assert touched.path != first.path and touched.meta.checksum == first.meta.checksum


@pytest.mark.parametrize("damage", ["shorter", "flipped", "no meta", "bad meta", "no documents", "half a meta"])
def test_a_damaged_chunk_is_built_again(open_cache: Any, unit: Unit, lines: list[str], damage: str) -> None:
    whole = open_cache().get(unit, 0)
    expected = content(whole)
    if damage == "shorter":
        raw = (whole.path / "tokens.ds").read_bytes()
        (whole.path / "tokens.ds").write_bytes(raw[:-2])
    elif damage == "flipped":
        raw = (whole.path / "tokens.ds").read_bytes()
        (whole.path / "tokens.ds").write_bytes(raw[:100] + bytes([raw[100] ^ 1]) + raw[101:])
    elif damage == "no documents":
        (whole.path / "documents.npy").unlink()
    elif damage == "no meta":
        (whole.path / "meta.json").unlink()
    else:
        (whole.path / "meta.json").write_text("{" if damage == "bad meta" else '{"format": 1}')
    again = open_cache().get(unit, 0)
    assert content(again) == expected
    assert lines == [f"cached chunk {whole.path} is damaged; building it again"]


def aged(folder: Path, seconds: float, of: str) -> Path:
    """A folder that nobody has written to for so long, in itself or in its files."""
    when = folder.stat().st_mtime - seconds
    for path in (folder, *folder.iterdir()):
        os.utime(path, (when, when) if of == "all" or path == folder else None)
    return folder


def test_what_a_killed_builder_left_is_swept_once_it_is_old(open_cache: Any, unit: Unit) -> None:
    cache = open_cache()
    path = cache.get(unit, 0).path
    left = {
        name: path.parent / f".tmp-{path.name if name != 'of another' else 'other'}-{name}"
        for name in ("dead", "of another", "in work", "young")
    }
    for folder in left.values():
        shutil.copytree(path, folder)
    aged(left["dead"], 4000, of="all")
    aged(left["of another"], 4000, of="all")
    aged(left["in work"], 4000, of="folder")
    aged(left["young"], 3000, of="all")
    shutil.rmtree(path)
    assert open_cache().get(unit, 0).path == path
    assert set(path.parent.iterdir()) == {path, left["in work"], left["young"]}


@pytest.mark.parametrize("damaged", [False, True])
def test_builders_without_locks_leave_each_other_alone(
    open_cache: Any, unit: Unit, lines: list[str], monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    whole = open_cache().get(unit, 0)
    expected, path = content(whole), whole.path
    shutil.rmtree(path)
    if damaged:
        path.mkdir()
        (path / "meta.json").write_text("{")
    caches, write = [open_cache() for _ in range(4)], ChunkCache._write
    together = threading.Barrier(len(caches), timeout=30)

    def in_step(self: ChunkCache, folder: Path, *args: Any) -> None:
        together.wait()  # all have begun
        write(self, folder, *args)
        assert folder.is_dir()
        together.wait()  # all are about to rename

    monkeypatch.setattr(ChunkCache, "_write", in_step)
    monkeypatch.setattr(cancel_module.fcntl, "flock", lambda *args: None)
    with ThreadPoolExecutor(len(caches)) as pool:
        found = list(pool.map(lambda cache: cache.get(unit, 0), caches))
    assert [content(chunk) for chunk in found] == [expected] * len(caches)
    assert {chunk.path for chunk in found} == {path} == set(path.parent.iterdir())
    assert damaged or sum(cache.num_built for cache in caches) == 1
    assert lines == [f"cached chunk {path} is damaged; building it again"] * damaged


def test_a_chunk_that_came_to_stand_there_is_kept(
    open_cache: Any, unit: Unit, lines: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While ours was built, and just before a damaged one would have been removed."""
    cache, other = open_cache(), open_cache(tmp_path / "other")
    whole, target = other.get(unit, 0), cache._path(cache._name(unit, 0))
    monkeypatch.setattr(
        cache,
        "_write",
        lambda folder, *args: [shutil.copytree(whole.path, path, dirs_exist_ok=True) for path in (folder, target)],
    )
    assert cache.get(unit, 0) == replace(whole, path=target)
    assert (cache.num_built, list(target.parent.iterdir())) == (0, [target])
    monkeypatch.undo()
    stamp = target.stat().st_ino
    cache._remove_damaged(target)
    assert (target.stat().st_ino, list(target.parent.iterdir())) == (stamp, [target])
    is_whole = cache_module._is_whole

    def looked_at(chunk: Chunk | None) -> bool:
        shutil.copytree(whole.path, target)
        return is_whole(chunk)

    monkeypatch.setattr(cache_module, "_is_whole", looked_at)
    cache._remove_damaged(target)
    assert target.stat().st_ino != stamp and list(target.parent.iterdir()) == [target]
    assert lines == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_reported_once(
    open_cache: Any, jsonl: Any, lines: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cancel_module.fcntl, "flock", refuse)
    cache = open_cache()
    for unit in list_units(jsonl(count=200), chunk_bytes=2048)[:3]:
        assert cache.get(unit, 0).meta.num_documents
    assert cache.num_built == 3
    why = f"there are no locks on the file system of {tmp_path / 'cache'} ({os.strerror(number)})"
    assert lines == [f"{why}: others may build the same chunks"]


def test_a_lock_that_fails_otherwise_is_an_error(open_cache: Any, unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(cancel_module.fcntl, "flock", fail)
    with pytest.raises(DataError, match="token cache cannot be written: Input/output error"):
        open_cache().get(unit, 0)


def test_chunks_of_a_unit_in_any_order(open_cache: Any, tmp_path: Path, texts: Any) -> None:
    import gzip

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts(100)).encode()))
    (unit,) = list_units(JsonlCorpus(name="a", kind="jsonl", path=str(path)), chunk_bytes=2048)
    in_order, cache = [], open_cache()
    while not in_order or not in_order[-1].meta.is_last:
        in_order.append(cache.get(unit, len(in_order)))
    assert len(in_order) > 3
    other = open_cache(tmp_path / "other")
    for index in (2, 0, 3, 1):
        assert content(other.get(unit, index)) == content(in_order[index])
    with pytest.raises(DataError, match="the source is shorter than it was"):
        other.get(unit, len(in_order))


def test_bad_records_are_listed_beside_the_chunk(open_cache: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\noops\n{"text": "y"}\n')
    chunk = open_cache().get(list_units(JsonlCorpus(name="a", kind="jsonl", path=str(path)))[0], 0)
    assert (chunk.meta.num_documents, chunk.meta.num_bad) == (2, 1)
    (line,) = (chunk.path / "bad.jsonl").read_text().splitlines()
    reason = "not JSON: Expecting value: line 1 column 1 (char 0)"
    assert json.loads(line) == {"file": str(path), "record": 1, "start": 14, "reason": reason}
    assert [(file, bad.reason) for file, bad in bad_records(chunk)] == [(str(path), reason)]


def test_a_chunk_without_documents(open_cache: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": " "}\n')
    chunk = open_cache().get(list_units(JsonlCorpus(name="a", kind="jsonl", path=str(path)))[0], 0)
    assert (chunk.meta.num_documents, chunk.meta.num_empty, content(chunk)) == (0, 1, [])


def test_a_cache_that_cannot_be_written(open_cache: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="token cache cannot be written: Not a directory") as caught:
        open_cache(tmp_path / "file" / "cache")
    assert "data.cache" in str(caught.value)


def test_a_disk_that_fills_up(open_cache: Any, unit: Unit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.np, "save", full)
    with pytest.raises(DataError, match="No space left on device"):
        open_cache().get(unit, 0)
    assert not [path for path in (tmp_path / "cache" / "chunks").rglob("*") if path.is_file()]


def test_cancelling_stops_and_leaves_nothing(open_cache: Any, unit: Unit, tmp_path: Path) -> None:
    calls = iter([False, False, True])
    with pytest.raises(Cancelled):
        open_cache(cancelled=lambda: next(calls)).get(unit, 0)
    assert not [path for path in (tmp_path / "cache" / "chunks").rglob("*") if path.is_file()]
    assert open_cache().get(unit, 0).meta.num_documents == 50


def test_two_builders_share_the_work(open_cache: Any, unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[int] = []
    write = ChunkCache._write

    def counted(self: ChunkCache, *args: Any) -> None:
        builds.append(1)
        threading.Event().wait(0.3)
        write(self, *args)

    monkeypatch.setattr(ChunkCache, "_write", counted)
    caches = [open_cache() for _ in range(3)]
    threads = [threading.Thread(target=cache.get, args=(unit, 0)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_read_chunk_of_nothing(tmp_path: Path) -> None:
    assert read_chunk(tmp_path / "missing") is None


@pytest.mark.parametrize("kind", ["sections", "whole"])
def test_a_long_document_without_whitespace(open_cache: Any, tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    text = "".join(np.random.default_rng(2).choice(["stone", "river", "é", "moon", "x1"], 100_000).tolist())
    path = tmp_path / "a.txt"
    if kind == "sections":
        path.write_text(text, encoding="utf-8")
        corpus: Any = TextCorpus(name="a", kind="text", path=str(path))
    else:
        path.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
        corpus = JsonlCorpus(name="a", kind="jsonl", path=str(path))
    cache, found, ids = open_cache(), [], []
    for unit in list_units(corpus):
        chunk = cache.get(unit, 0)
        found += chunk.documents().tolist()
        ids += content(chunk)
    sizes = [row[1] for row in found]
    raw = text.encode()
    assert sum(sizes) == len(raw)
    if kind == "whole":
        assert ids == [tokenizer.backend.encode(text).ids]
    else:
        assert max(sizes) <= 65_536 * 3 // 2
        starts = np.cumsum([0, *sizes]).tolist()
        pieces = [raw[a:b].decode() for a, b in pairwise(starts)]
        assert ids == [tokenizer.backend.encode(piece).ids for piece in pieces]
