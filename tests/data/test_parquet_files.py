from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from lmssl.data.corpus import list_units, read_chunks
from lmssl.data.records import BadRecord, Record
from lmssl.errors import DataError
from lmssl.recipe.data import ParquetCorpus


def write(path: Path, texts: Any, rows: int = 10) -> ParquetCorpus:
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    parquet.write_table(table, path, row_group_size=rows)
    return ParquetCorpus(name="a", kind="parquet", path=str(path))


def test_units_are_runs_of_row_groups(tmp_path: Path) -> None:
    texts = [f"{i} " + "word " * 100 for i in range(100)]
    units = list_units(write(tmp_path / "a.parquet", texts), chunk_bytes=10_000)
    assert 3 < len(units) <= 10
    found = [d for unit in units for chunk in read_chunks(unit, max_bad_records=0) for d in chunk.documents]
    assert [d.text for d in found] == texts
    assert [d.start for d in found] == list(range(100))


def test_a_huge_row_group_yields_several_chunks(tmp_path: Path) -> None:
    texts = [f"{i} " + "word " * 100 for i in range(100)]
    (unit,) = list_units(write(tmp_path / "a.parquet", texts, rows=100), chunk_bytes=5_000)
    chunks = list(read_chunks(unit, max_bad_records=0))
    assert len(chunks) > 5
    assert [d.text for chunk in chunks for d in chunk.documents] == texts


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_arrow_type_of_text_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    corpus = write(tmp_path / "a.parquet", pa.array(["one", "two"]).cast(kind))
    (chunk,) = read_chunks(list_units(corpus)[0], max_bad_records=0)
    assert [d.text for d in chunk.documents] == ["one", "two"]


def test_nulls_and_bad_utf8_are_set_aside(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"b\xffd", None, b"fine"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    corpus = write(tmp_path / "a.parquet", text)
    (chunk,) = read_chunks(list_units(corpus)[0], max_bad_records=2)
    assert [d.text for d in chunk.documents] == ["good", "fine"]
    assert [(bad.start, bad.reason.partition(":")[0]) for _, bad in chunk.bad] == [
        (1, "not UTF-8"),
        (2, "field 'text' holds NoneType instead of text"),
    ]
    assert all(isinstance(bad, BadRecord) and not isinstance(bad, Record) for _, bad in chunk.bad)


def test_a_wrong_field(tmp_path: Path) -> None:
    corpus = write(tmp_path / "a.parquet", ["one"]).model_copy(update={"field": "txt"})
    with pytest.raises(DataError, match="field 'txt': no such field; the fields are id, text") as caught:
        list_units(corpus)
    assert "did you mean 'text'?" in str(caught.value)
    with pytest.raises(DataError, match="field 'id': it holds int64, not text"):
        list_units(corpus.model_copy(update={"field": "id"}))


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    corpus = write(path, ["one"])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="parquet file is truncated or corrupt") as caught:
        list_units(corpus)
    assert caught.value.where == str(path)


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied")

    corpus = write(tmp_path / "a.parquet", ["one"])
    monkeypatch.setattr(parquet, "ParquetFile", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        list_units(corpus)


def test_a_file_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the corpus holds no text"):
        list_units(write(tmp_path / "a.parquet", pa.array([], pa.string())))
