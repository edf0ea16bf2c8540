import gzip
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lmssl.data import readers
from lmssl.data.readers import read_part
from lmssl.data.records import BadRecord, Format, Item, Part, Record, file_version
from lmssl.errors import DataError

JSONL = Format("jsonl", field="text")


def read(form: Format, path: Path, start: int = 0, stop: int | None = None) -> list[Item]:
    return list(read_part(form, Part(str(path), file_version(str(path)), start, stop)))


def texts(items: list[Item]) -> list[str]:
    assert all(isinstance(item, Record) for item in items), items
    return [item.text for item in items if isinstance(item, Record)]


def test_a_file_is_a_document_without_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree \xf0\x9f\x8c\x99\0")
    assert texts(read(Format("text", document="file"), path)) == ["one\ntwo\n\nthree 🌙\0"]


def test_lines_and_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n  two\r\n \r\n\r\nthree\n\n\n")
    assert texts(read(Format("text", document="line"), path)) == ["one", "  two", "three"]
    found = read(Format("text", document="paragraph"), path)
    assert texts(found) == ["one\n  two", "three"]
    assert [path.read_bytes()[item.start :][:5] for item in found[1:]] == [b"three"]


LINES = st.lists(st.sampled_from(["", " ", "a", "bb bb", "ccc", "é\u2028x", "d" * 30]), max_size=30)
CUTS = st.lists(st.integers(0, 300), max_size=5)


@pytest.mark.parametrize("document", ["line", "paragraph"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@given(lines=LINES, cuts=CUTS, final=st.booleans())
def test_ranges_that_tile_a_file_give_every_record_once(
    tmp_path_factory: pytest.TempPathFactory,
    document: str,
    newline: str,
    lines: list[str],
    cuts: list[int],
    final: bool,
) -> None:
    path = tmp_path_factory.mktemp("tiles") / "a.txt"
    path.write_bytes((newline.join(lines) + (newline if final else "")).encode())
    form = Format("text", document=document)  # type: ignore[arg-type]
    size = path.stat().st_size
    ends = [0, *sorted({cut for cut in cuts if 0 < cut < size}), size]
    tiles = [item for a, b in pairwise(ends) for item in read(form, path, a, b)]
    whole = read(form, path)
    assert [(item.start, text) for item, text in zip(tiles, texts(tiles), strict=True)] == [
        (item.start, text) for item, text in zip(whole, texts(whole), strict=True)
    ]


@given(lines=LINES, cuts=CUTS)
def test_ranges_of_a_file_to_be_cut_into_sections_join_to_its_text(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("tiles") / "a.txt"
    path.write_bytes("\n".join(lines).encode())
    size = path.stat().st_size
    ends = [0, *sorted({cut for cut in cuts if 0 < cut < size}), size]
    tiles = [read(Format("text", document="file"), path, a, b) for a, b in pairwise(ends)]
    assert "".join("".join(texts(tile)) for tile in tiles).split() == "\n".join(lines).split()


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one\\r\\n"}\r\n\n{"id": 1, "text": "two"}')
    found = read(JSONL, path)
    assert texts(found) == ["one\r\n", "two"]
    assert [path.read_bytes()[item.start :][:1] for item in found] == [b"{", b"{"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at byte 31"),
        (b'["text"]', "a JSON list instead of an object"),
        (b'{"body": "a"}', "no field 'text'"),
        (b'{"text": null}', "holds NoneType instead of text"),
        (b'{"text": 5}', "holds int instead of text"),
        (b'{"text": "\\ud83d"}', "lone surrogate, U\\+D83D"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_bad_line_is_set_aside(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + b"\n" * 2 + line + b'\n{"text": "after"}\n')
    before, bad, after = read(JSONL, path)
    assert (before, after) == (Record(b"before", 0, 0), Record(b"after", 2, 21 + len(line) + 1))
    assert isinstance(bad, BadRecord) and (bad.number, bad.start) == (1, 21)
    assert re.search(reason, bad.reason), bad.reason


def test_bad_utf8_in_text_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nba\xe9d\ngood")
    one, bad, two = read(Format("text", document="line"), path)
    assert bad == BadRecord(1, 5, "not UTF-8: byte 0xe9 at byte 7")
    assert isinstance(one, Record) and isinstance(two, Record)


SECTIONS = Format("text", document="file", section_bytes=256)
DAMAGED = st.lists(
    st.sampled_from(
        [b"", b" \r", b"a", b"bb\r", "\u20ac".encode(), b"c\xe9", b"\xe2\x82", b"line\n" * 80, b"\xff\n" * 200]
    ),
    max_size=30,
)


@settings(deadline=None)
@given(lines=DAMAGED, cuts=CUTS, mark=st.booleans())
def test_text_in_sections_loses_the_paragraphs_that_are_damaged_wherever_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], cuts: list[int], mark: bool
) -> None:
    raw = b"\xef\xbb\xbf" * mark + b"\n".join(lines)
    path = tmp_path_factory.mktemp("tiles") / "a.txt"
    path.write_bytes(raw)
    ends = [0, *sorted({cut for cut in cuts if 0 < cut < len(raw)}), len(raw)]
    expected, good, at = [], b"", 0
    for piece in re.split(rb"(?m)(^[ \t\r]*\n)", raw):
        for part in [piece] if len(piece) <= 384 else piece.splitlines(keepends=True):
            if is_decodable(part):
                good += part
            else:
                expected.append((at, at + len(part)))
            at += len(part)
    good = good.removeprefix(b"\xef\xbb\xbf")
    packed = path.with_name("a.txt.gz")
    packed.write_bytes(gzip.compress(raw))
    tiles = [item for a, b in pairwise(ends) for item in read(SECTIONS, path, a, b)]
    for found in (read(SECTIONS, path), read(SECTIONS, packed), tiles):
        bad = [item for item in found if isinstance(item, BadRecord)]
        assert [item.start for item in bad] == [start for start, _ in expected]
        for item, (start, stop) in zip(bad, expected, strict=True):
            place = re.fullmatch(r"not UTF-8: byte 0x(..) at byte (\d+)", item.reason)
            assert place and start <= int(place[2]) < stop and raw[int(place[2])] == int(place[1], 16)
        kept = [item for item in found if isinstance(item, Record)]
        assert b"".join(item.raw for item in kept).split() == good.split()
        assert all(
            raw[item.start :].removeprefix(b"\xef\xbb\xbf")[:1] == item.raw[:1] for item in kept if item.raw[0] != 10
        )
    assert [item.number for item in read(SECTIONS, path)] == list(range(len(read(SECTIONS, path))))


def test_a_file_that_is_one_document_is_good_or_bad_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\nba\xe9d\n\ngood")
    assert read(Format("text", document="file"), path) == [BadRecord(0, 0, "not UTF-8: byte 0xe9 at byte 8")]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_records_are_those_of_the_plain_file(tmp_path: Path, suffix: str) -> None:
    plain, packed = tmp_path / "a.jsonl", tmp_path / f"a.jsonl{suffix}"
    lines = [json.dumps({"text": "x" * i}).encode() for i in range(500)]
    plain.write_bytes(b"\n".join([*lines[:100], b'{"text": "\xe9"}', *lines[100:], b"{"]))
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    packed.write_bytes(pack(plain.read_bytes()))
    assert read(JSONL, plain) == read(JSONL, packed)
    assert [item.number for item in read(JSONL, packed) if isinstance(item, BadRecord)] == [100, 501]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_archive_names_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    path.write_bytes(pack("".join(map(str, range(9999))).encode())[:-20])
    with pytest.raises(DataError, match="truncated or corrupt") as caught:
        read(Format("text", document="line"), path)
    assert caught.value.where == str(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        file_version(str(tmp_path / "a.txt"))


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read(Format("text", document="line"), tmp_path)


def test_a_file_that_changed_since_it_was_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    part = Part(str(path), file_version(str(path)))
    path.write_text("another")
    with pytest.raises(DataError, match="changed after the corpus was listed"):
        list(read_part(Format("text", document="line"), part))


def test_a_line_as_long_as_its_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * (8 << 20))
    num_bytes: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            count = super().readinto(buffer)
            num_bytes.append(count)
            return count

    monkeypatch.setattr(readers, "open_bytes", lambda path: io.BufferedReader(Counted(path), 65_536))
    ends = [*range(0, 8 << 20, 1 << 17), 8 << 20]
    for document in ("line", "paragraph", "file"):
        num_bytes.clear()
        tiles = [read(Format("text", document=document), path, a, b) for a, b in pairwise(ends)]
        assert [len(tile) for tile in tiles] == [1] + [0] * 63
        assert sum(num_bytes) < 3 * (8 << 20)  # the record, and each range once, in whole buffers


def is_decodable(raw: bytes) -> bool:
    try:
        raw.decode()
        return True
    except UnicodeDecodeError:
        return False


BYTES = st.one_of(
    st.binary(max_size=12),
    st.text(max_size=6).map(str.encode),
    # Surrogates, too long forms, beyond the last character, cut off.
    st.sampled_from(
        [b"\xed\xa0\x80", b"\xc0\x80", b"\xe0\x80\x80", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\xff"]
    ),
)


@given(st.lists(BYTES, max_size=6), st.sampled_from([0, 1, 7, 30]), st.sampled_from([b"a", "\u20ac".encode()]))
def test_long_bytes_are_utf8_where_python_decodes_them(parts: list[bytes], place: int, filling: bytes) -> None:
    raw = filling * place + b"".join(parts) + filling * 9000
    assert readers.is_utf8(raw) == is_decodable(raw)
    assert readers.is_utf8(b"".join(parts)) == is_decodable(b"".join(parts))
    cut = filling * 9000 + b"".join(parts)
    assert readers.is_utf8(cut) == is_decodable(cut)


@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"a", b"some text"])), st.sampled_from([0, 10_000]))
def test_line_ends_are_plain_whether_few_or_many(parts: list[bytes], before: int) -> None:
    raw = b"x" * before + b"".join(parts)
    assert readers.plain_ends(raw) == raw.replace(b"\r\n", b"\n")
    assert (
        readers.plain_ends(b"".join(parts) + b"x" * before) == b"".join(parts).replace(b"\r\n", b"\n") + b"x" * before
    )
