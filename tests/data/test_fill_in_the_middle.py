import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from lmssl.data.batch import SequenceBatch, training_batches
from lmssl.data.chunk import DOCUMENT_FIELDS
from lmssl.data.fill_in_the_middle import NUM_SENTINELS, FillInTheMiddle, Middles, document_ids
from lmssl.data.stream import SequenceStream
from lmssl.data.window import Window
from lmssl.errors import DataError
from lmssl.recipe.batches import BatchPlan
from lmssl.recipe.data import DataSection, FillInTheMiddleSection
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

PRE, MID, SUF = -1, -2, -3
NAMES = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
IntArray = np.ndarray[Any, np.dtype[np.int64]]


def transform(rate: float = 1.0, spm_rate: float = 0.5) -> FillInTheMiddle:
    return FillInTheMiddle(rate, spm_rate, PRE, MID, SUF)


def middles(num_tokens: list[int], seed: int = 1, epoch: int = 0, **rates: float) -> Middles:
    documents = document_ids(np.array([(i, 0, 0, 0, 7, 0) for i in range(len(num_tokens))], DOCUMENT_FIELDS))
    return Middles(transform(**rates), seed, epoch, documents, np.array(num_tokens, np.int64))


def content(found: Middles, document: int, tokens: IntArray, cuts: list[int] | None = None) -> list[int]:
    """A document's content as it is packed, gathered in pieces that end at `cuts`."""
    length = len(tokens) + NUM_SENTINELS * int(found.chosen[document])
    inner = sorted(cut for cut in {*(cuts or [])} if 0 < cut < length)
    firsts, lasts = np.array([0, *inner]), np.array([*inner, length])
    documents, row = np.full(len(firsts), document), np.full(length, -9)
    _, pieces = found.write(documents, (firsts, lasts, firsts), row)
    for first, last, to in zip(*pieces, strict=True):
        row[to : to + last - first] = tokens[first:last]
    return [int(value) for value in row]


def original(ids: list[int], prefix: int = PRE, middle: int = MID, suffix: int = SUF) -> list[int]:
    """Prefix-first or suffix-first, what follows the three sentinels is prefix, suffix, middle."""
    if ids[:1] != [prefix]:
        return ids
    assert [ids.count(mark) for mark in (prefix, middle, suffix)] == [1, 1, 1]
    second, third = ids.index(suffix), ids.index(middle)
    assert second < third
    return ids[1:second] + ids[third + 1 :] + ids[second + 1 : third]


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.lists(st.integers(0, 45), max_size=6),
    st.integers(0, 2**63 - 1),
    st.integers(0, 5),
    st.sampled_from([0.01, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_the_original_comes_back_however_a_document_is_cut(
    num_tokens: list[int], cuts: list[int], seed: int, epoch: int, rate: float, spm_rate: float
) -> None:
    found = middles(num_tokens, seed, epoch, rate=rate, spm_rate=spm_rate)
    for document, count in enumerate(num_tokens):
        tokens = np.arange(count) + 100
        ids = content(found, document, tokens, cuts)
        assert ids == content(found, document, tokens)
        assert original(ids) == tokens.tolist()
        if found.chosen[document] and spm_rate == 1.0:
            assert ids[:2] == [PRE, SUF]


@given(st.integers(1, 40), st.integers(0, 42), st.integers(0, 42), st.integers(0, 99))
def test_spans_reach_from_the_first_to_the_last_token_held(n: int, a: int, b: int, seed: int) -> None:
    first, stop = sorted((min(a, n + 3), min(b, n + 3)))
    found = middles([n], seed)
    held = [value for value in content(found, 0, np.arange(n))[first:stop] if value >= 0]
    low, high = found.spans(np.array([0]), np.array([first]), np.array([stop]))
    assert (int(low[0]), int(high[0])) == ((min(held), max(held) + 1) if held else (0, 0))
    plain = middles([n], seed, rate=1e-12)
    assert [int(x[0]) for x in plain.spans(np.array([0]), np.array([first]), np.array([stop]))] == [first, stop]


def test_shares_and_cuts_are_those_asked_for() -> None:
    n, count = 999, 20_000
    found = middles([n] * count, rate=0.3, spm_rate=0.2)
    assert found.chosen.mean() == pytest.approx(0.3, abs=0.01)
    heads, middle_lengths = [], []
    for document in np.flatnonzero(found.chosen)[:3000].tolist():
        ids = content(found, document, np.arange(n))
        heads.append(ids.index(SUF) - 1)
        middle_lengths.append(n + 2 - ids.index(MID))
    assert np.mean(np.array(heads) == 0) == pytest.approx(0.2, abs=0.03)
    prefix_first = np.array(heads) > 0
    # Two uniform cuts divide a document into three parts of equal expected length.
    assert np.array(heads)[prefix_first].mean() == pytest.approx(n / 3, rel=0.05)
    assert np.array(middle_lengths)[prefix_first].mean() == pytest.approx(n / 3, rel=0.05)


def test_the_choice_is_the_documents_and_cuts_are_the_epochs() -> None:
    first, again, later, other = (
        middles([50] * 200, seed, epoch, rate=0.5) for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert np.array_equal(first.chosen, later.chosen) and not np.array_equal(first.chosen, other.chosen)
    texts = [[content(found, i, np.arange(50)) for i in range(200)] for found in (first, again, later)]
    assert texts[0] == texts[1]
    different = [a != b for a, b in zip(texts[0], texts[2], strict=True)]
    assert sum(different) > 0.9 * first.chosen.sum() and not np.array(different)[~first.chosen].any()
    # Suffix-first stays suffix-first.
    marks = [{i for i, ids in enumerate(text) if ids[:2] == [PRE, SUF]} for text in (texts[0], texts[2])]
    assert len(marks[0] ^ marks[1]) < 10  # an empty prefix looks like it


def test_documents_are_told_apart_by_text_and_place() -> None:
    rows = np.array(
        [(1, 9, 0, 0, 0, 0), (2, 9, 0, 0, 0, 0), (1, 9, 0, 0, 5, 0), (1, 9, 0, 0, 0, 5), (1, 8, 3, 4, 0, 0)],
        DOCUMENT_FIELDS,
    )
    ids = document_ids(rows)
    assert len(set(ids.tolist())) == 4 and ids[0] == ids[4]


@pytest.fixture(scope="session")
def marked(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny tokenizer with the three sentinels."""
    folder = tmp_path_factory.mktemp("marked")
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(NAMES)
    backend.save(str(folder / "tokenizer.json"))
    config = (tokenizer.path / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(config)
    return load_tokenizer(folder)


Open = Callable[..., SequenceStream]


@pytest.fixture
def open_marked(tmp_path: Path, marked: Tokenizer) -> Open:
    def build(corpus: Any, *, ledger: Any = None, seed: int = 7, **fields: Any) -> SequenceStream:
        small = {"sequence_length": 32, "chunk_bytes": 4096, "window_chunks": 4, "block_sequences": 16, "bos": True}
        chosen = {"validation": {"ratio": 0.1, "tokens": 2000}, "fill_in_the_middle": {}, **fields}
        section = DataSection(mixture=(corpus,), **{**small, **chosen})
        return SequenceStream.open(section, marked, seed, tmp_path / "cache", ledger)

    return build


def whole_documents(window: Window) -> dict[int, list[int]]:
    """Ids of each document of a window, put together from the segments of its sequences."""
    pieces: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    packing = window.packing
    for index in range(window.num_sequences):
        row = window.gather(index)
        begin, end = packing.offsets[window._sequence_at[index]], packing.offsets[window._sequence_at[index] + 1]
        for number, (document, start) in enumerate(
            zip(packing.documents[begin:end].tolist(), packing.starts[begin:end].tolist(), strict=True), 1
        ):
            pieces[document].append((start, row.ids_T[row.segments_T == number].tolist()))
    return {document: [i for _, part in sorted(parts) for i in part] for document, parts in pieces.items()}


def sentinel_ids(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.backend.token_to_id(name) for name in NAMES]


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
@pytest.mark.parametrize("align_starts", [False, True])
def test_windows_hold_rearranged_documents(
    open_marked: Open, jsonl: Any, marked: Tokenizer, packing: str, align_starts: bool
) -> None:
    corpus = jsonl(count=150)
    settings: dict[str, Any] = {"packing": packing, "align_starts": align_starts}
    plain = open_marked(corpus, fill_in_the_middle=None, **settings)
    stream = open_marked(corpus, fill_in_the_middle={"rate": 0.6}, **settings)
    windows = zip(plain.first_epoch("tales"), stream.first_epoch("tales"), strict=True)
    for number, ((_, before), (_, window)) in enumerate(windows):
        entry = stream.ledger.entries("tales")[number]
        old, new = whole_documents(before), whole_documents(window)
        num_moved = 0
        assert old.keys() == new.keys()
        for document, ids in new.items():
            assert (ids[0], ids[-1]) == (marked.bos_id, marked.eos_id)
            moved = ids[1] == sentinel_ids(marked)[0]
            num_moved += moved
            assert len(ids) == len(old[document]) + 3 * moved
            assert original(ids[1:-1], *sentinel_ids(marked)) == old[document][1:-1]
        assert entry.num_tokens == before.num_tokens + 3 * num_moved
        assert entry.num_bytes == before.num_bytes
        if len(new) > 30:
            assert 0.3 < num_moved / len(new) < 0.9


def test_pieces_name_the_tokens_that_rows_hold(open_marked: Open, jsonl: Any, marked: Tokenizer) -> None:
    stream = open_marked(jsonl(count=100))
    special = {*sentinel_ids(marked), marked.bos_id, marked.eos_id}
    _, window = next(stream.first_epoch("tales"))
    for index in range(window.num_sequences):
        row = window.gather(index)
        for piece in window.pieces(index):
            ids = [i for i in row.ids_T[piece.start : piece.start + piece.length].tolist() if i not in special]
            begin = int(window._begins[(window._chunk_of == piece.chunk) & (window._rows == piece.row)][0])
            held = window._tokens[piece.chunk][begin + piece.first : begin + piece.stop].tolist()
            assert len(held) >= len(ids) and not set(ids) - set(held)


def epoch_texts(stream: SequenceStream, epoch: int) -> tuple[list[int], list[list[int]]]:
    """Sequences per window, and ids of every document, of one epoch."""
    epochs, number = stream._epochs["tales"], 0
    counts, found = [], []
    while epochs.ensure(number).epoch <= epoch:
        if epochs.entry(number).epoch == epoch:
            window = Window(epochs.plan(number), stream.layout)
            counts.append(window.num_sequences)
            found += whole_documents(window).values()
        number += 1
    return counts, found


def test_epochs_differ_in_cuts_alone(open_marked: Open, jsonl: Any, marked: Tokenizer) -> None:
    stream = open_marked(jsonl(count=150), window_chunks=100, validation=None)
    (_, first), (_, second) = (epoch_texts(stream, epoch) for epoch in (1, 2))
    by_text = [{tuple(original(ids[1:-1], *sentinel_ids(marked))): ids for ids in found} for found in (first, second)]
    assert by_text[0].keys() == by_text[1].keys() and len(by_text[0]) == 150
    pairs = [(ids, by_text[1][text]) for text, ids in by_text[0].items()]
    assert all(len(a) == len(b) for a, b in pairs)
    assert sum(a != b for a, b in pairs) > 40


def as_is(batch: SequenceBatch) -> SequenceBatch:
    return batch


@pytest.mark.parametrize("workers", [0, 1])
def test_through_the_loader(open_marked: Open, jsonl: Any, marked: Tokenizer, workers: int) -> None:
    stream = open_marked(jsonl(count=150), packing="none", sequence_length=2048, validation=None, bos=False)
    count = stream.num_sequences_per_epoch()["tales"]
    plain = open_marked(
        jsonl(count=150), packing="none", sequence_length=2048, validation=None, bos=False, fill_in_the_middle=None
    )
    batches = training_batches(
        stream,
        plan=BatchPlan.even(count),
        micro_batch_sequences=16,
        world_size=1,
        rank=0,
        start_step=0,
        num_steps=1,
        prepare=as_is,
        workers=workers,
    )
    found = set()
    for batch in next(batches):
        for ids, segments, position in zip(batch.ids_BT, batch.segments_BT, batch.positions_B.tolist(), strict=True):
            if position >= 0:
                assert ids.tolist() == stream.sequence(position).ids_T.tolist()
                found.add(tuple(original(ids[segments > 0][:-1].tolist(), *sentinel_ids(marked))))
    batches.close()  # type: ignore[attr-defined]
    rows = [plain.sequence(position) for position in range(count)]
    assert found == {tuple(row.ids_T[row.segments_T > 0][:-1].tolist()) for row in rows}


def test_held_out_documents_stay_as_they_are(open_marked: Open, jsonl: Any, marked: Tokenizer) -> None:
    corpus = jsonl(count=300)
    settings: dict[str, Any] = {"validation": {"ratio": 0.3, "tokens": 5000}}
    stream, plain = open_marked(corpus, **settings), open_marked(corpus, fill_in_the_middle=None, **settings)
    (split,), (same,) = stream.validation(), plain.validation()
    assert split.num_sequences == same.num_sequences > 10
    for index in range(split.num_sequences):
        assert np.array_equal(split.sequence(index).ids_T, same.sequence(index).ids_T)


def test_a_sentinel_that_the_tokenizer_lacks(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"fill_in_the_middle.prefix is '<\|fim_prefix\|>'.*no such token") as caught:
        FillInTheMiddle.of(FillInTheMiddleSection(), tokenizer)
    assert caught.value.where == str(tokenizer.path) and "lmssl extend-tokenizer" in str(caught.value)


def test_sentinels_that_are_not_three(marked: Tokenizer) -> None:
    with pytest.raises(DataError, match="are not three tokens"):
        FillInTheMiddle.of(FillInTheMiddleSection(suffix=NAMES[0]), marked)


def test_a_changed_rate_under_a_ledger(open_marked: Open, jsonl: Any) -> None:
    corpus = jsonl()
    ledger = open_marked(corpus).ledger
    assert json.loads(json.dumps(ledger.settings)) == ledger.settings
    with pytest.raises(DataError, match="data.fill_in_the_middle decides the order of the data, and changed"):
        open_marked(corpus, ledger=ledger, fill_in_the_middle={"rate": 0.4})
