"""Within an epoch each document's tokens appear exactly once, as the loader hands them out.

In these corpora every word stands once and is a token, so a token tells its document and its place in it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from lmssl.data.batch import SequenceBatch, training_batches
from lmssl.data.stream import SequenceStream
from lmssl.data.trace import Tracer
from lmssl.recipe.batches import BatchPlan
from lmssl.recipe.data import DataSection, JsonlCorpus
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

SPECIAL = ["<bos>", "<eos>", "<pad>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
FIRST = len(SPECIAL)  # id of the first word
BATCH = 5
Open = Callable[..., SequenceStream]
Segments = dict[tuple[str, int], list[list[int]]]
"""Segments of each (corpus, epoch)."""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer whose tokens are the words `w0`, `w1`, ..."""
    folder = tmp_path_factory.mktemp("words")
    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *(f"w{i}" for i in range(20_000))])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.add_special_tokens(SPECIAL)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)


@pytest.fixture
def open_words(tmp_path: Path, words: Tokenizer) -> Open:
    """`open_words(*corpora, **settings)`: a stream of words over a cache of its own."""
    caches = count()

    def build(*corpora: JsonlCorpus, **fields: Any) -> SequenceStream:
        small = {"sequence_length": 64, "chunk_bytes": 4096, "window_chunks": 4, "block_sequences": 16}
        section = DataSection(mixture=corpora, validation=fields.pop("validation", None), **{**small, **fields})
        return SequenceStream.open(section, words, 7, tmp_path / f"cache-{next(caches)}")

    return build


def written(path: Path, lengths: Iterable[int], first: int = 0) -> list[range]:
    """Write documents of so many words each, the words numbered from `first` on; returns their token ids."""
    documents, at = [], first
    for length in lengths:
        documents.append(range(FIRST + at, FIRST + at + length))
        at += length
    lines = (json.dumps({"text": " ".join(f"w{i - FIRST}" for i in document)}) + "\n" for document in documents)
    path.write_text("".join(lines), encoding="utf-8")
    return documents


def corpus(path: Path, **fields: Any) -> JsonlCorpus:
    return JsonlCorpus(name=path.stem, kind="jsonl", path=str(path), **fields)


def lognormal(seed: int, num_documents: int) -> list[int]:
    """From 1 to some hundreds, most below 30."""
    draw = np.random.Generator(np.random.Philox(seed)).lognormal(2.7, 1.1, num_documents)
    return [int(length) + 1 for length in draw]


def as_is(batch: SequenceBatch) -> SequenceBatch:
    return batch


def epochs(stream: SequenceStream, num_epochs: int, world_size: int) -> Segments:
    """The segments of the first epochs, as the ranks of a run get them; each position is read once."""
    at = (position for position in count() if stream.address(position).epoch >= num_epochs)
    corpora, stop = {c.name for c in stream.section.mixture}, 0
    past: set[str] = set()
    while past != corpora:
        stop = next(at)
        past.add(stream.address(stop).corpus)
    found, read = defaultdict(list), set()  # type: Segments, set[int]
    layout = {"plan": BatchPlan.even(BATCH), "micro_batch_sequences": 2, "world_size": world_size, "start_step": 0}
    for rank in range(world_size):
        steps = training_batches(stream, **layout, rank=rank, num_steps=-(-stop // BATCH), prepare=as_is, workers=0)
        for batch in (batch for step in steps for batch in step):
            for row in np.flatnonzero(batch.positions_B >= 0).tolist():
                position = int(batch.positions_B[row])
                assert position not in read
                read.add(position)
                address = stream.address(position)
                found[address.corpus, address.epoch] += segments(batch.ids_BT[row], batch.segments_BT[row])
    assert read == set(range(-(-stop // BATCH) * BATCH))
    return {key: value for key, value in found.items() if key[1] < num_epochs}


def segments(ids_T: Any, segments_T: Any) -> Iterator[list[int]]:
    for number in range(1, int(segments_T.max(initial=0)) + 1):
        yield ids_T[segments_T == number].tolist()


def check_once(found: list[list[int]], documents: Sequence[range], *, bos: bool, eos: bool) -> None:
    """Every token of the documents once, in order in a segment, and special tokens where documents begin and end."""
    specials = Counter(token for segment in found for token in segment if token < FIRST)
    assert specials == Counter({0: bos * len(documents), 1: eos * len(documents)})
    begins, ends = {d[0] for d in documents}, {d[-1] for d in documents}
    owner = {token: number for number, document in enumerate(documents) for token in document}
    seen: list[int] = []
    for segment in found:
        assert segment
        content = [token for token in segment if token >= FIRST]
        assert all(b == a + 1 for a, b in pairwise(content))
        assert len({owner[token] for token in content}) <= 1
        assert 0 not in segment[1:] and 1 not in segment[:-1]
        if content:  # a cut may leave a special token alone
            assert segment[0] != 0 or content[0] in begins
            assert segment[-1] != 1 or content[-1] in ends
        seen += content
    assert sorted(seen) == [token for document in documents for token in document]


@pytest.mark.parametrize("align_starts", [False, True], ids=["", "aligned"])
@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_each_token_once_in_each_of_two_epochs(
    open_words: Open, tmp_path: Path, packing: str, align_starts: bool
) -> None:
    paths = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    documents = {"a": written(paths[0], lognormal(1, 200)), "b": written(paths[1], lognormal(2, 90), first=9000)}
    stream = open_words(
        corpus(paths[0], weight=0.7),
        corpus(paths[1], weight=0.3),
        sequence_length=32,
        packing=packing,
        align_starts=align_starts,
        bos=True,
    )
    found = epochs(stream, 2, world_size=3)
    assert found.keys() == {(name, epoch) for name in "ab" for epoch in (0, 1)}
    for (name, _), held in found.items():
        check_once(held, documents[name], bos=True, eos=True)
        if packing == "best_fit":
            cut = Counter(document for segment in held if (document := whose(segment, documents[name])) is not None)
            assert all(cut[number] == 1 for number, tokens in enumerate(documents[name]) if len(tokens) + 2 <= 32)
    assert found["a", 0] != found["a", 1]


def whose(segment: list[int], documents: Sequence[range]) -> int | None:
    """The document that a segment holds words of."""
    words = [token for token in segment if token >= FIRST]
    return next((number for number, tokens in enumerate(documents) if words and words[0] in tokens), None)


RANDOM = {
    "lengths": st.lists(st.one_of(st.integers(1, 12), st.integers(1, 150)), min_size=1, max_size=80),
    "sequence_length": st.sampled_from([8, 16, 50]),
    "packing": st.sampled_from(["best_fit", "concat", "none"]),
    "special": st.tuples(st.booleans(), st.booleans()),
    "chunk_bytes": st.sampled_from([1024, 2000, 10**6]),
    "window_chunks": st.integers(1, 5),
    "world_size": st.sampled_from([1, 2, 3, 8]),
    "align_starts": st.booleans(),
}


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**RANDOM)
def test_each_token_once_whatever_the_settings(open_words: Open, tmp_path: Path, **drawn: Any) -> None:
    path = tmp_path / "c.jsonl"
    documents = written(path, drawn.pop("lengths"))
    bos, eos = drawn.pop("special")
    world_size = drawn.pop("world_size")
    stream = open_words(corpus(path), bos=bos, eos=eos, **drawn)
    found = epochs(stream, 2, world_size)
    for epoch in (0, 1):
        check_once(found["c", epoch], documents, bos=bos, eos=eos)


def test_each_token_once_of_documents_filled_in_the_middle(open_words: Open, tmp_path: Path) -> None:
    documents = written(tmp_path / "c.jsonl", lognormal(3, 150))
    stream = open_words(
        corpus(tmp_path / "c.jsonl"),
        sequence_length=32,
        fill_in_the_middle={"rate": 0.5},
    )
    for held in epochs(stream, 2, world_size=2).values():
        found = Counter(token for segment in held for token in segment)
        sentinels = [found.pop(token) for token in (3, 4, 5)]
        assert sentinels[0] == sentinels[1] == sentinels[2] and 40 < sentinels[0] < 110
        assert found.pop(1) == len(documents)
        assert found == Counter(token for document in documents for token in document)


def test_what_is_held_out_or_filtered_is_in_no_epoch_and_the_rest_once(open_words: Open, tmp_path: Path) -> None:
    documents = written(tmp_path / "c.jsonl", lognormal(4, 250))
    stream = open_words(
        corpus(tmp_path / "c.jsonl"),
        validation={"ratio": 0.2, "tokens": 10**6},
        filters={"min_tokens": 4, "max_tokens": 80},
    )
    (split,) = stream.validation()
    rows = [split.sequence(index) for index in range(split.num_sequences)]
    held_out = [segment for row in rows for segment in segments(row.ids_T, row.segments_T)]
    apart = {number for segment in held_out if (number := whose(segment, documents)) is not None}
    check_once(held_out, [documents[number] for number in sorted(apart)], bos=False, eos=True)
    assert 25 < len(apart) < 80
    kept = [tokens for number, tokens in enumerate(documents) if number not in apart and 4 <= len(tokens) <= 80]
    assert 0 < len(kept) < len(documents) - len(apart)
    for held in epochs(stream, 2, world_size=2).values():
        check_once(held, kept, bos=False, eos=True)


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_documents_put_together_from_their_traces_are_what_direct_encoding_gives(
    open_stream: Any, jsonl: Callable[..., JsonlCorpus], texts: Any, tokenizer: Tokenizer, packing: str
) -> None:
    stream = open_stream(jsonl(count=80), sequence_length=32, packing=packing, bos=True, validation=None)
    (size,) = stream.num_sequences_per_epoch().values()
    tracer, expected = Tracer(stream, tokenizer), texts(80)
    second = next(position for position in count(size) if stream.address(position).epoch == 2) - size
    for positions in (range(size), range(size, size + second)):
        pieces: dict[int, list[tuple[int, int, list[int]]]] = defaultdict(list)
        for traced in tracer.sequences(positions):
            for held in traced.segments:
                assert held.byte_start is not None and held.byte_end is not None
                ids = traced.ids[held.start : held.start + held.length]
                pieces[held.record].append((held.byte_start, held.byte_end, ids))
        assert sorted(pieces) == list(range(80))
        for record, text in enumerate(expected):
            # A segment of eos alone holds no bytes and comes last.
            parts = sorted(pieces[record], key=lambda part: part[:2])
            bounds = [(begin, end) for begin, end, _ in parts]
            assert bounds[0][0] == 0 and bounds[-1][1] == len(text.encode())
            assert all(a[1] == b[0] for a, b in pairwise(bounds))
            ids = [token for _, _, part in parts for token in part]
            direct = tokenizer.backend.encode(text, add_special_tokens=False).ids
            assert ids == [tokenizer.bos_id, *direct, tokenizer.eos_id]
