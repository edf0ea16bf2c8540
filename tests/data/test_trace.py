from __future__ import annotations

import gzip
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from lmssl.data.search import search
from lmssl.data.stream import SequenceStream
from lmssl.data.trace import TracedSequence, Tracer
from lmssl.errors import DataError
from lmssl.recipe.data import DatasetsCorpus, JsonlCorpus, ParquetCorpus, TextCorpus, TokensCorpus
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

Open = Callable[..., SequenceStream]
Records = dict[tuple[str, int], str]
STRANGE = ["👩‍🚀 🇩🇪 👍🏽", "日本語のテキスト", "e\u0301\u0327 ñ ǅ", "Straße — “quoted”…", "ไทย हिन्दी", "\u200b\ufeffx"]


def epoch_of(stream: SequenceStream) -> range:
    return range(sum(stream.num_sequences_per_epoch().values()))


def check_tiling(stream: SequenceStream, tokenizer: Tokenizer, records: Records) -> list[TracedSequence]:
    """Every segment holds the bytes it claims, and the segments of a record are all of it, once."""
    traced = list(Tracer(stream, tokenizer).sequences(epoch_of(stream)))
    spans = defaultdict(list)
    special = {getattr(stream.layout, f"{role}_id") for role in ("bos", "eos", "cls", "sep")}
    for sequence in traced:
        row = stream.sequence(sequence.position)
        assert sequence.ids == row.ids_T.tolist() and len(sequence.ids) == stream.layout.sequence_length
        assert sequence.num_padding_tokens == int((row.segments_T == 0).sum())
        end = 0
        for segment in sequence.segments:
            assert segment.start == end
            end += segment.length
            content = [token for token in sequence.ids[segment.start : end] if token not in special]
            raw = records[segment.file, segment.record].encode()[segment.byte_start : segment.byte_end]
            assert tokenizer.decode(content) == raw.decode(errors="replace")
            spans[segment.file, segment.record].append((segment.byte_start, segment.byte_end))
        assert end + sequence.num_padding_tokens == len(sequence.ids)
    assert spans.keys() == records.keys()
    for key, found in spans.items():
        begins, ends = zip(*sorted(found), strict=True)
        assert [*begins, len(records[key].encode())] == [0, *ends]
    return traced


def strange_texts(texts: Callable[..., list[str]], count: int) -> list[str]:
    draw = random.Random(3)
    return [f"{text} {draw.choice(STRANGE)} {text[:30]}" for text in texts(count)]


def write_lines(path: Path, lines: list[str], ending: str = "\n") -> None:
    path.write_bytes("".join(line + ending for line in lines).encode())


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
@pytest.mark.parametrize(("bos", "eos"), [(False, True), (True, True), (True, False), (False, False)])
def test_jsonl(
    open_stream: Open, tmp_path: Path, texts: Any, tokenizer: Tokenizer, packing: str, bos: bool, eos: bool
) -> None:
    documents = strange_texts(texts, 80)
    path = tmp_path / "a.jsonl"
    write_lines(path, [json.dumps({"text": text}) for text in documents])
    stream = open_stream(
        JsonlCorpus(name="a", kind="jsonl", path=str(path)),
        sequence_length=16,
        packing=packing,
        bos=bos,
        eos=eos,
        validation=None,
    )
    check_tiling(stream, tokenizer, {(str(path), i): text for i, text in enumerate(documents)})


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
@pytest.mark.parametrize(("wanted", "seps"), [({"cls", "sep"}, 1), ({"cls", "sep"}, 2), ({"cls"}, 1), ({"sep"}, 1)])
def test_special_tokens_around_segments_stand_for_no_bytes(
    open_stream: Open, tmp_path: Path, texts: Any, tokenizer: Tokenizer, packing: str, wanted: set[str], seps: int
) -> None:
    documents = strange_texts(texts, 80)
    path = tmp_path / "a.jsonl"
    write_lines(path, [json.dumps({"text": text}) for text in documents])
    corpus = JsonlCorpus(name="a", kind="jsonl", path=str(path))
    small = {"sequence_length": 16, "packing": packing, "eos": False, "validation": None}
    stream = open_stream(corpus, **small, **dict.fromkeys(wanted, True), seps_per_segment=seps)
    traced = check_tiling(stream, tokenizer, {(str(path), i): text for i, text in enumerate(documents)})
    first, last = int("cls" in wanted), seps * ("sep" in wanted)
    for sequence in traced:
        for segment in sequence.segments:
            ids = sequence.ids[segment.start : segment.start + segment.length]
            assert ids[:first] == [tokenizer.cls_id] * first and ids[len(ids) - last :] == [tokenizer.sep_id] * last
            assert segment.byte_start is not None and segment.byte_end is not None
            assert segment.byte_start < segment.byte_end or len(ids) - first - last < 4  # inside of a character
    assert max(segment.byte_start or 0 for sequence in traced for segment in sequence.segments) > 100  # some are cut


def test_records_behind_a_byte_cut_count_from_the_start_of_the_file(
    open_stream: Open, tmp_path: Path, texts: Any, tokenizer: Tokenizer
) -> None:
    documents = strange_texts(texts, 200)
    lines, records = [], {}
    path = tmp_path / "a.jsonl"
    for i, text in enumerate(documents):
        lines.append(json.dumps({"text": text}, ensure_ascii=False))
        records[str(path), i + i // 20] = text
        if i % 20 == 19:
            lines += ["", "not JSON", "   "]  # one bad record, and lines that are none
    write_lines(path, lines)
    stream = open_stream(JsonlCorpus(name="a", kind="jsonl", path=str(path)), validation=None)
    assert len({part.start for unit in stream.units("a") for part in unit.parts}) > 3
    check_tiling(stream, tokenizer, records)


@pytest.mark.parametrize("ending", [".zst", ".gz"])
def test_compressed_jsonl(open_stream: Open, tmp_path: Path, texts: Any, tokenizer: Tokenizer, ending: str) -> None:
    documents = strange_texts(texts, 150)
    raw = "".join(json.dumps({"body": text}) + "\n" for text in documents).encode()
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(zstandard.compress(raw) if ending == ".zst" else gzip.compress(raw))
    stream = open_stream(JsonlCorpus(name="a", kind="jsonl", path=str(path), field="body"), validation=None)
    check_tiling(stream, tokenizer, {(str(path), i): text for i, text in enumerate(documents)})
    assert len(stream.units("a")) == 1 and len(stream.ledger.entries("a")) > 1


def test_parquet(open_stream: Open, tmp_path: Path, texts: Any, tokenizer: Tokenizer) -> None:
    records: Records = {}
    for name, seed in (("a", 0), ("b", 1)):
        documents = [text if i % 17 else None for i, text in enumerate(texts(120, seed))]
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pa.table({"text": documents}), path, row_group_size=25)
        records |= {(str(path), i): text for i, text in enumerate(documents) if text is not None}
    corpus = ParquetCorpus(name="a", kind="parquet", path=str(tmp_path / "*.parquet"))
    check_tiling(open_stream(corpus, validation=None), tokenizer, records)


def test_lines(open_stream: Open, tmp_path: Path, texts: Any, tokenizer: Tokenizer) -> None:
    records: Records = {}
    for name, ending in (("a", "\n"), ("b", "\r\n")):
        documents = strange_texts(texts, 120)
        path = tmp_path / f"{name}.txt"
        write_lines(path, [line for text in documents for line in (text, "  ")], ending)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        records |= {(str(path), i): text for i, text in enumerate(documents)}
    corpus = TextCorpus(name="a", kind="text", path=str(tmp_path / "*.txt"), document="line")
    check_tiling(open_stream(corpus, validation=None), tokenizer, records)


def test_paragraphs(open_stream: Open, tmp_path: Path, texts: Any, tokenizer: Tokenizer) -> None:
    documents = [f"{a}\n{b}" for a, b in zip(strange_texts(texts, 150), texts(150, 2), strict=True)]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    found = [paragraph.strip("\n") for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))]
    assert found == documents
    corpus = TextCorpus(name="a", kind="text", path=str(path), document="paragraph")
    stream = open_stream(corpus, validation=None)
    assert len(stream.units("a")) > 3
    check_tiling(stream, tokenizer, {(str(path), i): text for i, text in enumerate(documents)})


def test_a_paragraph_behind_a_wide_blank_line_at_a_cut_is_found(
    open_stream: Open, tmp_path: Path, texts: Any, tokenizer: Tokenizer
) -> None:
    documents = [f"{i} {text}" for i, text in enumerate(texts(60))]
    path = tmp_path / "a.txt"
    path.write_text((" " * 700 + "\n").join(text + "\n" for text in documents), encoding="utf-8")
    stream = open_stream(
        TextCorpus(name="a", kind="text", path=str(path), document="paragraph"), chunk_bytes=1024, validation=None
    )
    check_tiling(stream, tokenizer, {(str(path), i): text for i, text in enumerate(documents)})


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_whole_files_are_one_record_however_they_are_cut(
    open_stream: Open, tmp_path: Path, texts: Any, tokenizer: Tokenizer, ending: str
) -> None:
    records: Records = {}
    for name, count in (("long", 300), ("short", 3)):
        path = tmp_path / f"{name}.txt"
        write_lines(path, [line for text in strange_texts(texts, count) for line in (text, "")], ending)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        records[str(path), 0] = path.read_text(encoding="utf-8-sig")
    corpus = TextCorpus(name="a", kind="text", path=str(tmp_path), section_bytes=1500)
    stream = open_stream(corpus, validation=None)
    assert len(stream.units("a")) > 3
    traced = check_tiling(stream, tokenizer, records)
    assert max(segment.byte_start or 0 for sequence in traced for segment in sequence.segments) > 4096


def test_sections_of_a_record(open_stream: Open, tmp_path: Path, texts: Any, tokenizer: Tokenizer) -> None:
    documents = ["\n\n".join(strange_texts(texts, 20)) for _ in range(4)]
    path = tmp_path / "a.jsonl"
    write_lines(path, [json.dumps({"text": text}) for text in documents])
    corpus = JsonlCorpus(name="a", kind="jsonl", path=str(path), section_bytes=700)
    check_tiling(open_stream(corpus, validation=None), tokenizer, {(str(path), i): t for i, t in enumerate(documents)})


@pytest.mark.parametrize("folder", ["wordpiece-8k", "unigram-8k"])
def test_other_tokenizers_tile_records_too(open_stream: Open, tmp_path: Path, root: Path, folder: str) -> None:
    tokenizer = load_tokenizer(root / "tokenizer" / folder)
    documents = [f"Number {i}: the old house under the river, {STRANGE[i % len(STRANGE)]} again." for i in range(30)]
    path = tmp_path / "a.jsonl"
    write_lines(path, [json.dumps({"text": text}) for text in documents])
    corpus = JsonlCorpus(name="a", kind="jsonl", path=str(path))
    section = open_stream(corpus, validation=None, eos=False, sequence_length=16).section
    stream = SequenceStream.open(section, tokenizer, 7, tmp_path / "cache")
    spans = defaultdict(list)
    for sequence in Tracer(stream, tokenizer).sequences(epoch_of(stream)):
        for segment in sequence.segments:
            spans[segment.record].append((segment.byte_start, segment.byte_end))
            raw = documents[segment.record].encode()[segment.byte_start : segment.byte_end]
            content = sequence.ids[segment.start : segment.start + segment.length]
            text = tokenizer.backend.normalizer.normalize_str(raw.decode())  # whole characters
            shown = tokenizer.decode(content).replace("##", "")
            if "[UNK]" not in shown:
                assert "".join(shown.split()) == "".join(text.split())
    assert len(spans) == len(documents)
    for record, found in spans.items():
        begins, ends = zip(*sorted(found), strict=True)
        assert [*begins, len(documents[record].encode())] == [0, *ends]


def test_later_epochs_and_several_corpora(open_stream: Open, jsonl: Any, texts: Any, tokenizer: Tokenizer) -> None:
    one, two = jsonl("one", 60, weight=1.0), jsonl("two", 60, seed=1, weight=3.0)
    stream = open_stream(one, two)
    documents = {one.path: texts(60), two.path: texts(60, 1)}
    last = 0
    for sequence in Tracer(stream, tokenizer).sequences([0, 5, 400, 401]):
        address = stream.address(sequence.position)
        assert sequence.epoch == address.epoch
        last = address.epoch
        for segment in sequence.segments:
            assert (
                segment.corpus == address.corpus
                and segment.file == stream.section.mixture[address.corpus == "two"].path
            )
            raw = documents[segment.file][segment.record].encode()[segment.byte_start : segment.byte_end]
            ids = sequence.ids[segment.start : segment.start + segment.length]
            assert tokenizer.decode([i for i in ids if i != tokenizer.eos_id]) == raw.decode()
    assert last > 1


def test_held_out_sequences(open_stream: Open, jsonl: Any, texts: Any, tokenizer: Tokenizer) -> None:
    stream = open_stream(jsonl("one"), jsonl("two", seed=1), validation={"ratio": 0.1, "tokens": 700})
    splits = stream.validation()
    count = sum(split.num_sequences for split in splits)
    traced = list(Tracer(stream, tokenizer).held_out(range(count)))
    rows = [split.sequence(i).ids_T.tolist() for split in splits for i in range(split.num_sequences)]
    assert [sequence.ids for sequence in traced] == rows
    assert [sequence.position for sequence in traced] == list(range(count))
    assert {sequence.epoch for sequence in traced} == {None}
    documents = {"one": texts(400), "two": texts(400, 1)}
    for sequence in traced:
        for segment in sequence.segments:
            raw = documents[segment.corpus][segment.record].encode()[segment.byte_start : segment.byte_end]
            ids = sequence.ids[segment.start : segment.start + segment.length]
            assert tokenizer.decode([i for i in ids if i != tokenizer.eos_id]) == raw.decode()
    with pytest.raises(DataError, match=f"there is no held-out sequence {count}; there are {count}"):
        Tracer(stream, tokenizer).held_out([count])


def test_without_a_split_nothing_is_held_out(open_stream: Open, jsonl: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="there are 0"):
        Tracer(open_stream(jsonl(), validation=None), tokenizer).held_out([0])


def test_cached_ids_of_another_encoding_are_refused(open_stream: Open, jsonl: Any, tokenizer: Tokenizer) -> None:
    stream = open_stream(jsonl())
    window, index = stream.window_at(0)
    path = window.chunks[window.pieces(index)[0].chunk].path / "tokens.ds"
    raw = bytearray(path.read_bytes())
    raw[0::2] = raw[1::2] = bytes(len(raw) // 2)
    path.write_bytes(raw)
    with pytest.raises(DataError, match="does not give the ids that are cached"):
        list(Tracer(stream, tokenizer).sequences([0]))


def test_ready_made_tokens_have_a_record_and_no_bytes(open_stream: Open, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.ds"
    documents = [[5 + i, 6, 7, *range(20, 20 + i % 9)] for i in range(200)]
    np.array([token for document in documents for token in document], "<u2").tofile(path)
    np.cumsum([len(document) for document in documents]).astype("<u8").tofile(tmp_path / "a.ds.index")
    stream = open_stream(TokensCorpus(name="a", kind="tokens", path=str(path)), validation=None)
    seen = set()
    for sequence in Tracer(stream, tokenizer).sequences(epoch_of(stream)):
        for segment in sequence.segments:
            assert (segment.file, segment.byte_start, segment.byte_end) == (str(path), None, None)
            ids = sequence.ids[segment.start : segment.start + segment.length]
            assert [i for i in ids if i != tokenizer.eos_id] == documents[segment.record]
            seen.add(segment.record)
    assert seen == set(range(200))
    reported: list[str] = []
    found = search(stream, "a", finder=Tracer(stream, tokenizer).finder, limit=9, report=reported.append)
    assert found == ([], False) and "consists of tokens" in reported[0]


def test_a_rearranged_document_spans_what_it_holds(
    open_stream: Open, jsonl: Any, texts: Any, tokenizer: Tokenizer
) -> None:
    sentinels = {"rate": 1.0, "prefix": "<bos>", "middle": "<pad>", "suffix": "a"}
    stream = open_stream(jsonl(), fill_in_the_middle=sentinels, sequence_length=512, validation=None)
    for sequence in Tracer(stream, tokenizer).sequences(epoch_of(stream)):
        for segment in sequence.segments:  # none is cut
            assert (segment.byte_start, segment.byte_end) == (0, len(texts(400)[segment.record].encode()))


def test_a_saved_dataset(open_stream: Open, tmp_path: Path, texts: Any, tokenizer: Tokenizer) -> None:
    import datasets

    documents = strange_texts(texts, 120)
    path = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(str(path))
    stream = open_stream(DatasetsCorpus(name="a", kind="datasets", path=str(path)), validation=None)
    assert len(stream.units("a")) > 2
    check_tiling(stream, tokenizer, {(str(path), i): text for i, text in enumerate(documents)})
