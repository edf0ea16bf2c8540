from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lmssl.data import locate
from lmssl.data.chunk import text_hash
from lmssl.data.corpus import read_chunks
from lmssl.data.locate import DocumentFinder, Source
from lmssl.data.units import list_units
from lmssl.errors import DataError
from lmssl.recipe.data import JsonlCorpus, PythonDocsCorpus, TextCorpus


def source(path: Path | str, start: int, text: str, offset: int = 0) -> Source:
    return Source(str(path), start, offset, len(text.encode()), text_hash(text))


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i:04}"}) + "\n" for i in range(1000)), encoding="utf-8")
    return path


def finder_of(path: Path) -> DocumentFinder:
    return DocumentFinder(list_units(JsonlCorpus(name="a", kind="jsonl", path=str(path)), chunk_bytes=2000))


def test_each_part_is_read_once_for_many_documents(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(lines.read_bytes()) // 1000
    finder, read = finder_of(lines), []
    real = locate.read_part

    def counted(form: Any, part: Any) -> Any:
        read.append((form.kind, part.start))
        return real(form, part)

    monkeypatch.setattr(locate, "read_part", counted)
    wanted = {source(lines, size * i, f"text {i:04}"): i for i in (999, 3, 500, 501, 502)}
    found = finder.find(wanted)
    assert {key: located.record for key, located in found.items()} == wanted
    assert len(set(read)) == len(read)  # searched as JSON, counted as lines
    before = len(read)
    assert finder.find([source(lines, size * 998, "text 0998")]).popitem()[1].record == 998
    assert len(read) == before + 1  # what was counted stays counted


def test_python_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmssl.data.python_docs import read_docs

    path = json.__file__
    monkeypatch.setattr("lmssl.data.python_docs.list_files", lambda: [path])
    finder = DocumentFinder(list_units(PythonDocsCorpus(name="docs", kind="python_docs")))
    records = list(read_docs(path))
    assert len(records) > 3
    for number, record in enumerate(records):
        key = source(path, record.start, record.text)
        located = finder.find([key])[key]
        assert (located.record, located.text, located.byte_start) == (number, record.text, 0)


def test_text_around_damage_is_found(tmp_path: Path) -> None:
    raw = b"".join(f"paragraph {i} says \u20ac {i * i}\n\n".encode() for i in range(400)).replace(
        b"8 says", b"8 s\xe9ys"
    )
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    units = list_units(TextCorpus(name="a", kind="text", path=str(path), section_bytes=256), chunk_bytes=2048)
    sources = [
        Source(str(path), document.start, document.offset, document.num_bytes, text_hash(document.text))
        for unit in units
        for chunk in read_chunks(unit, max_bad_records=100)
        for document in chunk.documents
    ]
    found = DocumentFinder(units).find(sources)
    assert len(units) > 3 and len(found) == len(sources) > 40
    for located in found.values():
        assert raw[located.byte_start : located.byte_end] == located.text.encode() and located.record == 0


def test_text_that_changed_is_refused(lines: Path) -> None:
    finder, status = finder_of(lines), os.stat(lines)
    with pytest.raises(DataError, match="is not the text that its cached tokens were made of"):
        finder.find([source(lines, 0, "text 0007")])
    with pytest.raises(DataError, match="is not the text that its cached tokens were made of"):
        finder.find([Source(str(lines), 0, 0, 3, text_hash("text 0000"))])
    with pytest.raises(DataError, match="the source changed"):
        finder.find([source(lines, 5, "text 0000")])  # no record starts there
    with pytest.raises(DataError, match="the source changed"):
        finder.find([source(lines.with_name("b.jsonl"), 0, "text 0000")])
    os.utime(lines, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    with pytest.raises(DataError, match="the source changed"):
        finder.find([source(lines, 0, "text 0000")])


def test_a_cut_inside_a_character_is_other_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("äöü", encoding="utf-8")
    finder = DocumentFinder(list_units(TextCorpus(name="a", kind="text", path=str(path))))
    with pytest.raises(DataError, match="is not the text"):
        finder.find([Source(str(path), 0, 1, 3, 0)])
