import gzip
import os
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from lmssl.data.archive import ARCHIVE_ERRORS, expansion, open_bytes
from lmssl.errors import DataError

SKIPPABLE = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
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
    path.write_bytes(SKIPPABLE + path.read_bytes())
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


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_text_that_packs_well_is_not_expanded_at_once(tmp_path: Path, suffix: str) -> None:
    path = compress(tmp_path / f"a{suffix}", bytes(64 << 20))
    tracemalloc.start()
    try:
        num_bytes = 0
        with open_bytes(str(path)) as file:
            while piece := file.read(1 << 16):
                num_bytes += len(piece)
        ratio = expansion(str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_bytes == 64 << 20 and ratio == num_bytes / path.stat().st_size
    assert peak < 8 << 20


def frames(text: bytes) -> list[bytes]:
    """The same text with every kind of header and block."""
    plain, checked = zstandard.ZstdCompressor(), zstandard.ZstdCompressor(write_checksum=True)
    stream = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compressobj()
    parts = [stream.compress(text[:50]), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK), stream.compress(text[50:])]
    return [plain.compress(text), checked.compress(text), b"".join(parts) + stream.flush(), checked.compress(b"")]


def decompressed(packed: bytes) -> bytes | None:
    """What zstandard makes of it byte by byte; None: an error, or an end inside a frame."""
    found, frame = [], None
    try:
        for i in range(len(packed)):
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            found.append(frame.decompress(packed[i : i + 1]))
            frame = None if frame.eof else frame
    except zstandard.ZstdError:
        return None
    return None if frame else b"".join(found)


@pytest.mark.parametrize("text", [b"the same again, " * 20 + bytes(300), bytes(range(40)), bytes(300_000)])
def test_zstd_frames_cut_or_changed_anywhere_are_what_zstandard_makes_of_them(tmp_path: Path, text: bytes) -> None:
    whole = frames(text)
    for number, frame in enumerate(whole):
        path = tmp_path / "a.zst"
        packed = frame + SKIPPABLE + whole[number - 1]
        cuts = [packed[:size] for size in range(1, len(packed) + 1)]
        flips = [packed[:i] + bytes([packed[i] ^ 1 << i % 8]) + packed[i + 1 :] for i in range(len(packed))]
        for changed in cuts + flips:
            path.write_bytes(changed)
            expected = decompressed(changed)
            if expected is None:
                with pytest.raises(ARCHIVE_ERRORS):
                    read(path)
            else:
                assert read(path) == expected
