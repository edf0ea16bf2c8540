import gzip
import os
from pathlib import Path

import pytest
import zstandard

from lmssl.data.archive import ARCHIVE_ERRORS, expansion, open_bytes
from lmssl.errors import DataError

TEXT = os.urandom(300_000).hex().encode()


def compress(path: Path, text: bytes) -> Path:
    pack = gzip.compress if path.suffix == ".gz" else zstandard.ZstdCompressor().compress
    path.write_bytes(pack(text))
    return path


def read(path: Path) -> bytes:
    with open_bytes(str(path)) as file:
        return file.read()


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".txt"])
def test_whole_files_read_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(TEXT) if suffix == ".txt" else compress(path, TEXT)
    assert read(path) == TEXT


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_members_are_one_text(tmp_path: Path, suffix: str) -> None:
    one, two = compress(tmp_path / f"1{suffix}", TEXT), compress(tmp_path / f"2{suffix}", b"tail")
    path = tmp_path / f"both{suffix}"
    path.write_bytes(one.read_bytes() + two.read_bytes())
    assert read(path) == TEXT + b"tail"
    assert expansion(str(path)) == pytest.approx((len(TEXT) + 4) / path.stat().st_size)


def test_skippable_zstd_frames_are_skipped(tmp_path: Path) -> None:
    path = compress(tmp_path / "a.zst", TEXT)
    path.write_bytes(b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note" + path.read_bytes())
    assert read(path) == TEXT


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_never_silent(tmp_path: Path, suffix: str, keep: float) -> None:
    path = compress(tmp_path / f"a{suffix}", TEXT)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ARCHIVE_ERRORS):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_expansion_names_what_is_not_an_archive(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"plain text, renamed")
    with pytest.raises(DataError, match="truncated or corrupt") as caught:
        expansion(str(path))
    assert caught.value.where == str(path)
