import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lmssl.data.corpus import Unit, cut_sections, list_units, mixture_weights, read_chunks, read_texts
from lmssl.data.records import Format, Part
from lmssl.errors import DataError
from lmssl.recipe.data import DatasetsCorpus, JsonlCorpus, ParquetCorpus, TextCorpus


@given(
    st.lists(st.sampled_from(["word", "é🌙", " ", "\n", "\n\n", "x" * 40]), max_size=60).map("".join),
    st.integers(4, 50),
)
def test_sections_join_to_the_text(text: str, section_bytes: int) -> None:
    sections = cut_sections(text.encode(), section_bytes)
    assert "".join(section.decode() for _, section in sections) == text  # no character is cut
    assert [offset for offset, _ in sections] == [
        len(b"".join(section for _, section in sections[:i])) for i in range(len(sections))
    ]
    assert all(len(section) <= section_bytes * 3 // 2 + 3 for _, section in sections)


def test_sections_end_at_blank_lines_then_lines_then_words() -> None:
    paragraphs = [section for _, section in cut_sections(b"aaa bbb\nccc\n\n" * 9, 30)]
    assert all(section.endswith(b"\n\n") for section in paragraphs)
    assert all(section.endswith(b"\n") for _, section in cut_sections(b"aaa bbb\n" * 9, 20))
    assert all(section.endswith(b" ") for _, section in cut_sections(b"aaa " * 20, 20)[:-1])


@pytest.mark.parametrize("kind", [TextCorpus, JsonlCorpus, ParquetCorpus, DatasetsCorpus])
@pytest.mark.parametrize("section_bytes", [-1, 0, 255])
def test_sections_of_no_size_are_refused(kind: Any, section_bytes: int) -> None:
    name = kind.__name__.removesuffix("Corpus").lower()
    with pytest.raises(ValidationError, match=r"section_bytes.*\n.*greater than or equal to 256"):
        kind(name="a", kind=name, path="a", section_bytes=section_bytes)
    assert kind(name="a", kind=name, path="a", section_bytes=256).section_bytes == 256


def test_documents_know_where_they_come_from(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first file")
    body = "\r\n\r\n".join(f"paragraph {i} é" for i in range(100))
    (tmp_path / "b.txt").write_bytes(body.encode())
    corpus = TextCorpus(name="a", kind="text", path=str(tmp_path), section_bytes=256)
    (unit,) = list_units(corpus)
    (chunk,) = read_chunks(unit, max_bad_records=0)
    first, *rest = chunk.documents
    assert (first.text, first.part, first.offset, first.num_bytes) == ("first file", 0, 0, 10)
    text = body.replace("\r\n", "\n").encode()
    assert len(rest) > 5
    assert all(text[d.offset :].startswith(d.text.encode()) and d.part == 1 and d.start == 0 for d in rest)


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "x"}\n{"text": " \\n\\t"}\n')
    (unit,) = list_units(JsonlCorpus(name="a", kind="jsonl", path=str(tmp_path / "a.jsonl")))
    (chunk,) = read_chunks(unit, max_bad_records=0)
    assert ([d.text for d in chunk.documents], chunk.num_empty) == (["x"], 2)


@pytest.mark.parametrize("chunk_bytes", [1024, 4096, 1 << 20])
def test_a_stray_byte_costs_its_paragraph_however_large_chunks_are(tmp_path: Path, chunk_bytes: int) -> None:
    paragraphs = [f"paragraph {i} of text\n\n".encode() for i in range(1000)]
    for i in (3, 4, 500, 998):
        paragraphs[i] = paragraphs[i].replace(b"of", b"\xe9f")
    path = tmp_path / "a.txt"
    path.write_bytes(b"".join(paragraphs))
    units = list_units(TextCorpus(name="a", kind="text", path=str(path)), chunk_bytes=chunk_bytes)
    chunks = [chunk for unit in units for chunk in read_chunks(unit, max_bad_records=2 if len(units) > 1 else 4)]
    assert [bad.start for chunk in chunks for _, bad in chunk.bad] == [
        len(b"".join(paragraphs[:i])) for i in (3, 4, 500, 998)
    ]
    kept = b"".join(document.raw for chunk in chunks for document in chunk.documents)
    assert kept.split() == b"".join(text for text in paragraphs if b"\xe9" not in text).split()
    with pytest.raises(DataError, match="more than 1 unreadable records; one of them: not UTF-8: byte 0xe9 at byte 75"):
        list(read_chunks(units[0], max_bad_records=1))


def test_bad_records_of_a_chunk_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + "oops\n" * 3)
    (unit,) = list_units(JsonlCorpus(name="a", kind="jsonl", path=str(tmp_path / "a.jsonl")))
    (chunk,) = read_chunks(unit, max_bad_records=3)
    assert [bad.number for _, bad in chunk.bad] == [1, 2, 3]
    with pytest.raises(DataError, match="more than 2 unreadable records") as caught:
        list(read_chunks(unit, max_bad_records=2))
    assert caught.value.where == f"{tmp_path / 'a.jsonl'}, record 1 (at 14)"


def test_texts_are_interleaved_by_weight(jsonl: Any) -> None:
    found = list(read_texts([jsonl("a", 300, weight=3.0), jsonl("b", 300, seed=1, weight=1.0)], max_bytes=20_000))
    sizes = [sum(len(text) for text in found if text.startswith(prefix)) for prefix in ("0-", "1-")]
    assert sizes[0] / sizes[1] == pytest.approx(3, rel=0.1)
    assert 20_000 <= sum(sizes) < 22_000


def test_texts_come_once_and_a_corpus_that_ends_leaves_the_rest(jsonl: Any, texts: Any) -> None:
    found = list(read_texts([jsonl("a", 10, weight=3.0), jsonl("b", 300, seed=1, weight=1.0)]))
    assert sorted(found) == sorted(texts(10) + texts(300, 1))


def test_long_texts_are_shortened_between_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ééé")
    (found,) = read_texts([TextCorpus(name="a", kind="text", path=str(tmp_path / "a.txt"))], max_document_bytes=3)
    assert found == "é"


def test_texts_of_a_corpus_without_any(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="the corpus holds no text"):
        list(read_texts([TextCorpus(name="a", kind="text", path=str(tmp_path / "a.txt"))]))


def test_texts_with_too_many_bad_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\noops\noops\n")
    corpus = JsonlCorpus(name="a", kind="jsonl", path=str(tmp_path / "a.jsonl"))
    assert list(read_texts([corpus], max_bad_records=2)) == ["x"]
    with pytest.raises(DataError, match="more than 1 unreadable"):
        list(read_texts([corpus], max_bad_records=1))


def test_weights_need_sizes() -> None:
    unknown = DatasetsCorpus(name="far", kind="datasets", path="owner/name")
    unit = Unit("far", Format("datasets", "text"), (Part("owner/name", "1"),), 0, 1000)
    assert mixture_weights([unknown], [[unit]]) == [1]
    with pytest.raises(DataError, match="size is not known in advance") as caught:
        mixture_weights([unknown, unknown], [[unit], [unit]])
    assert "give every corpus of the mixture a weight" in str(caught.value)
