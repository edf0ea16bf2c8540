import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from lmssl.data.corpus import list_units, read_chunks
from lmssl.data.units import MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, Unit, default_chunk_bytes, expand_paths
from lmssl.errors import DataError
from lmssl.recipe.data import JsonlCorpus, TextCorpus


def text(path: Path | str | tuple[str, ...], **fields: Any) -> TextCorpus:
    return TextCorpus(name="a", kind="text", path=path if isinstance(path, tuple) else str(path), **fields)


def documents(units: tuple[Unit, ...]) -> list[str]:
    return [d.text for unit in units for chunk in read_chunks(unit, max_bad_records=0) for d in chunk.documents]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten texts of 1,000 bytes, in two folders, and what should not be read."""
    for i in range(10):
        path = tmp_path / "texts" / ("even" if i % 2 == 0 else "odd") / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{i}" * 1000)
    (tmp_path / "texts" / "even" / ".hidden.txt").write_text("hidden")
    (tmp_path / "texts" / "even" / "notes.md").write_text("other")
    return tmp_path / "texts"


def test_a_folder_means_its_text_files(folder: Path) -> None:
    units = list_units(text(folder), chunk_bytes=1024)
    assert sorted(documents(units)) == sorted(f"{i}" * 1000 for i in range(10))


def test_small_files_share_a_unit_and_big_ones_are_cut(folder: Path) -> None:
    assert [len(unit.parts) for unit in list_units(text(folder), chunk_bytes=3000)] == [3, 3, 3, 1]
    (folder / "big.txt").write_text("line\n" * 4000)
    units = list_units(text(folder / "big.txt", document="line"), chunk_bytes=5000)
    assert [(part.start, part.stop) for unit in units for part in unit.parts] == [
        (0, 5000), (5000, 10000), (10000, 15000), (15000, 20000)
    ]  # fmt: skip
    assert documents(units) == ["line"] * 4000
    # A document that is a whole file cannot be cut, unless sections are made of it.
    assert len(list_units(text(folder / "big.txt", section_bytes=None), chunk_bytes=5000)) == 1
    assert len(list_units(text(folder / "big.txt"), chunk_bytes=5000)) == 4


def test_sections_are_automatic_for_few_files_only(folder: Path) -> None:
    assert list_units(text(folder))[0].form.section_bytes == 65_536
    assert list_units(text(folder, document="line"))[0].form.section_bytes is None
    for i in range(1000):
        (folder / f"many{i}.txt").write_text("x")
    assert list_units(text(folder))[0].form.section_bytes is None


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_is_one_unit_of_several_chunks(tmp_path: Path, suffix: str) -> None:
    lines = [json.dumps({"text": f"{i} " + "word " * 50}) for i in range(1000)]
    path = tmp_path / f"a.jsonl{suffix}"
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    path.write_bytes(pack("\n".join(lines).encode()))
    (unit,) = list_units(JsonlCorpus(name="a", kind="jsonl", path=str(path)), chunk_bytes=50_000)
    assert unit.num_bytes == pytest.approx(len("\n".join(lines)), rel=0.01)
    chunks = list(read_chunks(unit, max_bad_records=0))
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(50_000 <= sum(d.num_bytes for d in chunk.documents) < 50_300 for chunk in chunks[:-1])
    assert [d.text for chunk in chunks for d in chunk.documents] == [json.loads(line)["text"] for line in lines]


def test_chunk_sizes_follow_the_corpus() -> None:
    assert default_chunk_bytes(10) == MIN_CHUNK_BYTES
    assert default_chunk_bytes(64 << 20) == 1 << 20
    assert default_chunk_bytes(1 << 50) == MAX_CHUNK_BYTES
    assert MIN_CHUNK_BYTES <= default_chunk_bytes(0) <= MAX_CHUNK_BYTES


def test_paths_are_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder)
    assert len(expand_paths("~/texts/*/*.txt", "text")) == 10
    assert len(expand_paths("**/*.txt", "text")) == 10
    assert expand_paths(("odd", "odd/1.txt"), "text") == sorted(str(path) for path in folder.glob("odd/*.txt"))
    (folder / "odd[1].txt").write_text("brackets in a name")
    assert expand_paths("odd[1].txt", "text") == [str(folder / "odd[1].txt")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.txt", "there is no such file"),
        ("*.doc", "the pattern matches no file"),
        ("empty", "the folder holds no .txt file"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        list_units(text(path))
    assert caught.value.where == path and str(tmp_path) in str(caught.value)


def test_remote_paths_name_the_way_out() -> None:
    with pytest.raises(DataError, match="kind: datasets"):
        list_units(text("s3://bucket/a.txt"))


def test_empty_files_are_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="the corpus holds no text"):
        list_units(text(tmp_path / "a.txt"))
