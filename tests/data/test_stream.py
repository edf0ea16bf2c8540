import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmssl.data.cache import ChunkCache
from lmssl.data.cancel import Cancelled
from lmssl.data.ledger import Ledger
from lmssl.data.stream import SequenceStream
from lmssl.data.window import Row
from lmssl.errors import DataError
from lmssl.recipe.data import JsonlCorpus, TextCorpus
from lmssl.tokenizer.load import Tokenizer

Open = Callable[..., SequenceStream]


def one_epoch(stream: SequenceStream, corpus: str) -> range:
    """Positions of a one-corpus stream's first epoch."""
    stream.totals()
    entries = []
    while not entries or not entries[-1].ends_epoch:
        stream.build_ahead(stream.ledger.num_sequences(corpus))
        entries = [entry for entry in stream.ledger.entries(corpus) if entry.epoch == 0]
    return range(sum(entry.num_sequences for entry in entries))


def documents(rows: list[Row], eos: int | None) -> Counter[tuple[int, ...]]:
    """Segments of the rows, each without its final eos."""
    found: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        for number in range(1, row.segments_T.max() + 1):
            ids = row.ids_T[row.segments_T == number].tolist()
            found[tuple(ids[:-1] if eos is not None and ids[-1] == eos else ids)] += 1
    return found


def encoded(tokenizer: Tokenizer, texts: list[str]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokenizer.backend.encode(text, add_special_tokens=False).ids) for text in texts)


def same(a: Row, b: Row) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_epoch_holds_every_document_once_and_none_that_is_held_out(
    open_stream: Open, jsonl: Any, texts: Any, tokenizer: Tokenizer
) -> None:
    stream = open_stream(jsonl(), sequence_length=512)  # longer than any document, so none is cut
    rows = [stream.sequence(position) for position in one_epoch(stream, "tales")]
    (split,) = stream.validation()
    held_out = [split.sequence(index) for index in range(split.num_sequences)]
    train, validation = documents(rows, tokenizer.eos_id), documents(held_out, tokenizer.eos_id)
    assert not train & validation
    stream = open_stream(jsonl(), sequence_length=512, validation={"ratio": 0.1, "tokens": 10**6})
    (split,) = stream.validation()
    validation = documents([split.sequence(index) for index in range(split.num_sequences)], tokenizer.eos_id)
    assert train + validation == encoded(tokenizer, texts(400))
    assert 20 < validation.total() < 60


def test_epochs_differ_in_order_and_agree_in_content(open_stream: Open, jsonl: Any, tokenizer: Tokenizer) -> None:
    stream = open_stream(jsonl(), sequence_length=512)
    count = len(one_epoch(stream, "tales"))
    second_epoch: list[int] = []
    position = count
    while stream.address(position).epoch == 1:
        second_epoch.append(position)
        position += 1
    first, second = ([stream.sequence(p) for p in ps] for ps in (range(count), second_epoch))
    assert documents(first, tokenizer.eos_id) == documents(second, tokenizer.eos_id)
    assert not same(first[0], second[0])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_long_documents_come_back_whole(
    open_stream: Open, jsonl: Any, texts: Any, tokenizer: Tokenizer, bos: bool, eos: bool, packing: str
) -> None:
    stream = open_stream(jsonl(count=60), sequence_length=16, packing=packing, bos=bos, eos=eos, validation=None)
    num_tokens = Counter[int]()
    num_bytes = 0.0
    for position in one_epoch(stream, "tales"):
        row = stream.sequence(position)
        used = row.segments_T > 0
        num_tokens.update(row.ids_T[used].tolist())
        num_bytes += row.num_bytes
        assert (row.ids_T[~used] == tokenizer.pad_id).all() and (row.offsets_T[~used] == 0).all()
        for number in range(1, row.segments_T.max() + 1):
            offsets = row.offsets_T[row.segments_T == number]
            assert offsets.tolist() == list(range(len(offsets)))
    expected = Counter(token for ids in encoded(tokenizer, texts(60)) for token in ids)
    expected += Counter({tokenizer.bos_id: 60 * bos, tokenizer.eos_id: 60 * eos})
    assert num_tokens == expected
    assert num_bytes == pytest.approx(sum(len(text.encode()) for text in texts(60)))
    totals = stream.totals()
    assert (totals.num_documents, totals.num_tokens) == (60, expected.total())


def test_cold_cache_warm_cache_and_random_access_agree(open_stream: Open, jsonl: Any) -> None:
    corpus = jsonl()
    streamed = open_stream(corpus)
    rows = [streamed.sequence(position) for position in range(120)]
    warm, other = open_stream(corpus), open_stream(corpus, cache="other")
    for position in (119, 3, 60, 0, 118):
        assert same(warm.sequence(position), rows[position])
        assert same(other.sequence(position), rows[position])


def test_a_seed_of_its_own_gives_an_order_of_its_own(open_stream: Open, jsonl: Any) -> None:
    corpus = jsonl()
    one, two = open_stream(corpus, seed=1), open_stream(corpus, seed=2)
    assert not all(same(one.sequence(p), two.sequence(p)) for p in range(5))


def test_mixture_shares_hold_in_every_block(open_stream: Open, jsonl: Any) -> None:
    stream = open_stream(jsonl("a", weight=3.0), jsonl("b", seed=1, weight=1.0))
    names = [stream.address(position).corpus for position in range(64)]
    assert [names[i : i + 16].count("a") for i in range(0, 64, 16)] == [12] * 4


def test_without_weights_shares_follow_the_bytes(open_stream: Open, jsonl: Any) -> None:
    big, small = jsonl("big", count=300), jsonl("small", count=100, seed=1)
    stream = open_stream(big, small, block_sequences=1000)
    sizes = [Path(corpus.path).stat().st_size for corpus in (big, small)]
    assert stream.order.counts_before(1000)["big"] == pytest.approx(1000 * sizes[0] / sum(sizes), abs=1)


def test_equal_texts_fall_on_one_side(open_stream: Open, tmp_path: Path, texts: Any) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"text": space + text}) + "\n" for space in ("", " ") for text in texts(200)))
    stream = open_stream(
        JsonlCorpus(name="twice", kind="jsonl", path=str(path)), validation={"ratio": 0.2, "tokens": 10**6}
    )
    (split,) = stream.validation()
    assert split.window.num_documents % 2 == 0 and split.window.num_documents > 40


def test_validation_respects_its_budget_and_the_weights(open_stream: Open, jsonl: Any) -> None:
    stream = open_stream(
        jsonl("a", weight=3.0), jsonl("b", seed=1, weight=1.0), validation={"ratio": 0.5, "tokens": 1000}
    )
    assert [(split.corpus, split.num_tokens) for split in stream.validation()] == [("a", 750), ("b", 250)]
    split = stream.validation()[0]
    rows = [split.sequence(index) for index in range(split.num_sequences)]
    assert sum(int((row.segments_T > 0).sum()) for row in rows) == 750
    assert sum(row.num_bytes for row in rows) == pytest.approx(split.num_bytes, abs=1)


def test_no_validation(open_stream: Open, jsonl: Any) -> None:
    assert open_stream(jsonl(), validation=None).validation() == ()


def test_an_empty_split_names_ratio_and_remedy(open_stream: Open, jsonl: Any) -> None:
    lines: list[str] = []
    stream = open_stream(jsonl(count=5), validation={"ratio": 1e-9, "tokens": 10}, report=lines.append)
    with pytest.raises(DataError, match="validation split is empty: at ratio 1e-09") as caught:
        stream.validation()
    assert "raise the ratio" in str(caught.value)
    assert lines == ["no document of corpus 'tales' is held out: evaluation does not cover it"]


def test_everything_held_out_is_an_error(open_stream: Open, jsonl: Any) -> None:
    stream = open_stream(jsonl(count=5), validation={"ratio": 0.999999, "tokens": 10})
    with pytest.raises(DataError, match="every document of the corpus is held out"):
        stream.sequence(0)


def test_less_text_than_a_batch(open_stream: Open, jsonl: Any) -> None:
    stream = open_stream(jsonl(count=20, name="a"), jsonl(count=20, name="b", seed=1), validation=None)
    total = sum(len(one_epoch(stream, name)) for name in "ab")
    stream.require_batch(total)
    with pytest.raises(DataError, match=f"hold {total} sequences of 64 tokens in all, and a batch takes {total + 1}"):
        stream.require_batch(total + 1)


def test_a_ledger_continues_the_order(open_stream: Open, jsonl: Any, tmp_path: Path) -> None:
    corpora = jsonl("a", weight=0.7), jsonl("b", seed=1, weight=0.3)
    stream = open_stream(*corpora)
    rows = [stream.sequence(position) for position in range(200)]
    stream.ledger_at(100).save(tmp_path / "ledger.jsonl")
    again = open_stream(*corpora, ledger=Ledger.load(tmp_path / "ledger.jsonl"), cache="other")
    assert all(same(again.sequence(position), rows[position]) for position in (199, 100, 101, 5))
    assert again.ledger_at(200).fingerprint == stream.ledger_at(200).fingerprint


def test_the_ledger_of_a_position_does_not_depend_on_what_was_built_ahead(open_stream: Open, jsonl: Any) -> None:
    corpus = jsonl()
    one, two = open_stream(corpus), open_stream(corpus)
    two.build_ahead(150)
    one.sequence(49)
    assert one.ledger.fingerprint != two.ledger.fingerprint
    assert one.ledger_at(50).fingerprint == two.ledger_at(50).fingerprint
    assert one.totals(50) == two.totals(50)
    assert one.ledger_at(0).entries("tales") == []


def test_text_that_changed_under_a_ledger(open_stream: Open, jsonl: Any, tmp_path: Path) -> None:
    corpus = jsonl()
    stream = open_stream(corpus)
    stream.sequence(0)
    path = Path(corpus.path)
    path.write_text(path.read_text().replace("river", "rover"))
    with pytest.raises(DataError, match="text of corpus 'tales' changed since the run began") as caught:
        open_stream(corpus, ledger=stream.ledger)
    assert caught.value.where == str(path)


def test_a_touched_file_is_not_a_changed_one(open_stream: Open, jsonl: Any) -> None:
    corpus = jsonl()
    stream = open_stream(corpus)
    row = stream.sequence(0)
    Path(corpus.path).touch()
    assert same(open_stream(corpus, ledger=stream.ledger).sequence(0), row)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"sequence_length": 128}, "data.sequence_length"),
        ({"packing": "concat"}, "data.packing"),
        ({"seed": 8}, "data.seed"),
        ({"window_chunks": 5}, "data.window_chunks"),
        ({"validation": None}, "data.validation.ratio"),
        ({"cls": True}, "data.cls"),
        ({"sep": True}, "data.sep"),
        ({"seps_per_segment": 2}, "how many sep tokens the objective puts into a segment"),
    ],
)
def test_a_changed_setting_under_a_ledger(open_stream: Open, jsonl: Any, change: dict[str, Any], name: str) -> None:
    corpus = jsonl()
    ledger = open_stream(corpus).ledger
    with pytest.raises(DataError, match=f"{name} decides the order of the data, and changed"):
        open_stream(corpus, ledger=ledger, **change)


def test_files_added_under_a_ledger(open_stream: Open, jsonl: Any) -> None:
    ledger = open_stream(jsonl()).ledger
    with pytest.raises(DataError, match="the text of corpus 'tales' changed since the run began"):
        open_stream(jsonl(count=500), ledger=ledger)


@pytest.mark.parametrize("role", ["bos", "eos"])
def test_a_special_token_the_tokenizer_lacks(jsonl: Any, tokenizer: Tokenizer, tmp_path: Path, role: str) -> None:
    from dataclasses import replace

    from lmssl.recipe.data import DataSection

    section = DataSection(sequence_length=64, mixture=(jsonl(),), bos=True, eos=True)
    lacking = replace(tokenizer, **{f"{role}_id": None})
    with pytest.raises(DataError, match=f"data.{role} is on, and the tokenizer has no {role} token"):
        SequenceStream.open(section, lacking, 1, tmp_path / "cache")


def test_the_first_record_lacks_the_field(open_stream: Open, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "Text": "hello"}\n')
    with pytest.raises(DataError, match="field 'text'.*the fields are Text, id") as caught:
        open_stream(JsonlCorpus(name="a", kind="jsonl", path=str(path)))
    assert "did you mean 'Text'?" in str(caught.value)
    path.write_text('{"text": {"en": "hello"}}\n')
    with pytest.raises(DataError, match="holds dict instead of text"):
        open_stream(JsonlCorpus(name="a", kind="jsonl", path=str(path)))


def test_bad_records_are_counted_over_the_corpus_and_bounded(open_stream: Open, tmp_path: Path, texts: Any) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) if i % 40 != 5 else "{oops" for i, text in enumerate(texts(400))]
    path.write_text("\n".join(lines))
    corpus = JsonlCorpus(name="a", kind="jsonl", path=str(path))
    stream = open_stream(corpus, max_bad_records=10)
    one_epoch(stream, "a")
    stream.build_ahead(3 * stream.ledger.num_sequences("a"))
    assert stream.totals().num_bad_records == 10
    with pytest.raises(DataError, match="more than 9 unreadable records; one of them: not JSON") as caught:
        one_epoch(open_stream(corpus, max_bad_records=9), "a")
    assert str(path) in str(caught.value.where)


def test_a_corpus_of_whitespace(open_stream: Open, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": " \\n"}\n' * 9)
    with pytest.raises(DataError, match="the corpus holds no text"):
        open_stream(JsonlCorpus(name="a", kind="jsonl", path=str(path))).sequence(0)


def test_a_corpus_in_another_encoding_is_not_called_empty(open_stream: Open, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Some text that is there.\n" * 9, encoding="utf-16")
    with pytest.raises(DataError, match=r"no text that can be read, of \d+ records none: .*UTF-8") as caught:
        open_stream(TextCorpus(name="a", kind="text", path=str(path))).sequence(0)
    assert str(path) in str(caught.value.where)


def test_an_interruption_leaves_no_trace_in_what_counts_as_a_duplicate(
    open_stream: Open, jsonl: Any, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, options = jsonl(), {"filters": {"drop_duplicates": True}, "window_chunks": 1}
    with Path(corpus.path).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts(400)[:40])
    whole = open_stream(corpus, **options)
    firsts = {whole.address(position).window: position for position in reversed(one_epoch(whole, "tales"))}
    rows = {window: whole.sequence(position) for window, position in firsts.items()}
    assert whole.totals().num_dropped_duplicates > 30
    again = open_stream(corpus, ledger=whole.ledger, cache="other", **options)
    assert same(again.sequence(firsts[0]), rows[0])
    get, count = ChunkCache.get, 0

    def interrupted(cache: ChunkCache, unit: Any, index: int) -> Any:
        nonlocal count
        count += 1
        if count > 5:
            raise Cancelled
        return get(cache, unit, index)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkCache, "get", interrupted)
        with pytest.raises(Cancelled):
            again.sequence(firsts[8])
    assert all(same(again.sequence(firsts[window]), rows[window]) for window in (2, 3, 1, 8))
