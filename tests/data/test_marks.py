"""A file's mark is its size and a hash of its beginning, middle and end, however it is read."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from lmssl.data import marks
from lmssl.errors import DataError


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 19, 20, 21, 29, 30, 31, 500])
def test_the_mark_of_a_file_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(marks, "_SAMPLE_BYTES", 10)
    content = random.Random(size).randbytes(size)
    (tmp_path / "text").write_bytes(content)
    middle, last = max(0, (size - 10) // 2), max(0, size - 10)
    parts = [content[start : start + 10] for start in sorted({0, middle, last})]
    assert marks._mark(str(tmp_path / "text")) == ("text", size, xxhash.xxh3_64(b"".join(parts)).hexdigest())


def test_marks_come_in_the_order_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "_BATCH_FILES", 3)
    paths = [tmp_path / f"{number}.txt" for number in range(11)]
    for number, path in enumerate(paths):
        path.write_text(str(number) * number, encoding="utf-8")
    with ThreadPoolExecutor(4) as threads:
        found = marks._marks(threads, [str(path) for path in paths])
        assert [(name, size) for name, size, _ in found] == [
            (path.name, i * len(str(i))) for i, path in enumerate(paths)
        ]
        paths[7].unlink()
        with pytest.raises(DataError, match="cannot be read") as caught:
            marks._marks(threads, [str(path) for path in paths])
    assert caught.value.where == str(paths[7])
