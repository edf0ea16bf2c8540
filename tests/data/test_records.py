from pathlib import Path

import pyarrow as pa
import pytest

from lmssl.data.records import BadRecord, Record, arrow_records, changed, checked, file_version, unreadable, wrong_field
from lmssl.errors import DataError


def test_a_version_changes_with_size_or_time(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    first = file_version(str(path))
    assert file_version(str(path)) == first
    path.write_text("four")
    assert file_version(str(path)) != first


@pytest.mark.parametrize(
    ("fields", "guess"),
    [
        (["id", "texts"], "did you mean 'texts'?"),
        (["TEXT"], "did you mean 'TEXT'?"),
        (["id", "body"], None),
        ([], None),
    ],
)
def test_the_nearest_field_is_named(fields: list[str], guess: str | None) -> None:
    error = wrong_field("text", fields, "a.jsonl")
    assert isinstance(error, DataError) and error.where == "a.jsonl"
    assert all(field in error.what for field in fields)
    assert error.remedy is not None and (guess in error.remedy if guess else "did you mean" not in error.remedy)


def test_a_null_is_a_bad_record_and_a_number_is_a_wrong_field() -> None:
    null, number = (checked(value, "text", 0, 0, ("text",)) for value in (None, 5))
    assert isinstance(null, BadRecord) and null.fields is None
    assert isinstance(number, BadRecord) and number.fields == ("text",)


def test_arrow_columns_count_on(tmp_path: Path) -> None:
    columns = [pa.array(["a", "b"]), pa.array(["c", None])]
    assert list(arrow_records(columns, "text", 10)) == [
        Record(b"a", 0, 10),
        Record(b"b", 1, 11),
        Record(b"c", 2, 12),
        BadRecord(3, 13, "field 'text' holds NoneType instead of text"),
    ]


def test_errors_name_the_file() -> None:
    assert unreadable("a", PermissionError(13, "Permission denied")).where == "a"
    assert changed("a").where == "a"
