"""The same positions hold the same tokens, whoever reads them: ranks, micro-batches, loaders, caches, resumptions."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lmssl.data.batch import SequenceBatch, num_micro_batches, training_batches
from lmssl.data.ledger import Ledger
from lmssl.data.order import kept_position
from lmssl.data.stream import SequenceStream
from lmssl.data.window import Row
from lmssl.objective.causal import CausalObjective
from lmssl.recipe.batches import BatchPlan
from lmssl.recipe.data import JsonlCorpus
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
SKIP = [(3, 9), (30, 31), (100, 120)]
# Two corpora of about 40 and 30 sequences: epochs end all along the 160 positions that are read below.
PLAIN: dict[str, Any] = {"packing": "concat", "validation": None}
EVERYTHING: dict[str, Any] = {
    "bos": True,
    "align_starts": True,
    "fill_in_the_middle": {"rate": 0.5},
    "filters": {"min_tokens": 5, "max_tokens": 150, "drop_duplicates": True},
    "stages": [{"from_tokens": 50 * 64, "weights": {"a": 0.2, "b": 0.8}}],
    "temperature": 2.0,
    "skip": SKIP,
}
RECIPES = pytest.mark.parametrize("recipe", [PLAIN, EVERYTHING], ids=["plain", "everything"])
SMALL = {"chunk_bytes": 1024, "window_chunks": 3}  # windows of a dozen sequences
Content = tuple[bytes, ...]


@dataclass(frozen=True)
class Read:
    """How some ranks read a part of a run; each step is `batch` sequences."""

    world_size: int
    batch: int
    micro: int = 2
    start: int = 0
    steps: int = 3
    workers: int = 0

    @property
    def positions(self) -> range:
        """As if nothing were skipped."""
        return range(self.start * self.batch, (self.start + self.steps) * self.batch)


@pytest.fixture(scope="module")
def tokenizer(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The small tokenizer with tokens for filling in the middle."""
    folder = tmp_path_factory.mktemp("tokenizer")
    content = json.loads((tokenizer.path / "tokenizer.json").read_text(encoding="utf-8"))
    first = content["added_tokens"][0]
    content["added_tokens"] += [
        {**first, "id": tokenizer.num_tokens + i, "content": name} for i, name in enumerate(FIM)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text((tokenizer.path / "tokenizer_config.json").read_text())
    return load_tokenizer(folder)


class Runs:
    """Streams over the same corpora and recipe, and what an uninterrupted one of them reads."""

    def __init__(self, build: Callable[..., SequenceStream], corpora: Iterable[JsonlCorpus], recipe: Any) -> None:
        self._build, self._corpora, self._recipe = build, tuple(corpora), recipe
        self._whole, self._caches = self.open("whole"), count()
        self._known: dict[int, Content] = {}
        self.skip = self._whole.section.skip

    def open(self, cache: str | None = "whole", ledger: Ledger | None = None, **changes: Any) -> SequenceStream:
        """A stream; None: over an empty cache."""
        where = f"cold-{next(self._caches)}" if cache is None else cache
        return self._build(*self._corpora, cache=where, ledger=ledger, **(SMALL | self._recipe | changes))

    def ledger_at(self, position: int) -> Ledger:
        """What an uninterrupted run saves."""
        return self._whole.ledger_at(position)

    def address(self, position: int) -> tuple[int, int]:
        """Epoch and window."""
        found = self._whole.address(position)
        return found.epoch, found.window

    def expected(self, indices: Iterable[int]) -> dict[int, Content]:
        """What stands at the kept positions of some indices."""
        found = [kept_position(index, self.skip) for index in indices]
        for position in found:
            if position not in self._known:
                self._known[position] = content(*self._whole.sequence(position))
        return {position: self._known[position] for position in found}


@pytest.fixture
def runs(open_stream: Any, jsonl: Any, texts: Any) -> Callable[[Any], Runs]:
    """`runs(recipe)`: over two corpora; the second is one compressed file and holds some texts twice."""
    plain, packed = jsonl("a", count=60, weight=0.7), jsonl("b", count=40, seed=1, weight=0.3)
    lines = [json.dumps({"text": text}) + "\n" for text in texts(40, 1)]
    path = Path(f"{packed.path}.gz")
    path.write_bytes(gzip.compress("".join(lines + lines[:8]).encode()))
    corpora = plain, packed.model_copy(update={"path": str(path)})
    return lambda recipe: Runs(open_stream, corpora, recipe)


def as_is(batch: SequenceBatch) -> SequenceBatch:
    return batch


def content(*arrays: Any) -> Content:
    """Ids, segments, offsets and bytes of a sequence."""
    ids, segments, offsets, num_bytes = arrays
    return ids.tobytes(), segments.tobytes(), offsets.tobytes(), float(num_bytes).hex().encode()


def rank_batches(stream: SequenceStream, read: Read, rank: int, prepare: Any = as_is) -> Iterator[list[Any]]:
    return training_batches(
        stream,
        plan=BatchPlan.even(read.batch),
        micro_batch_sequences=read.micro,
        world_size=read.world_size,
        rank=rank,
        start_step=read.start,
        num_steps=read.steps,
        prepare=prepare,
        workers=read.workers,
    )


def read_all(streams: Iterable[SequenceStream], read: Read, skip: Any) -> dict[int, Content]:
    """What all ranks together read by position, each with a stream of its own; shapes and steps are checked."""
    found: dict[int, Content] = {}
    num_micro = num_micro_batches(read.batch, read.micro, read.world_size)
    for rank, stream in zip(range(read.world_size), streams, strict=False):
        steps = list(rank_batches(stream, read, rank))
        assert [len(step) for step in steps] == [num_micro] * read.steps
        for number, step in enumerate(steps, read.start):
            here = {kept_position(number * read.batch + row, skip) for row in range(read.batch)}
            for batch in step:
                assert batch.ids_BT.shape == batch.segments_BT.shape == batch.offsets_BT.shape == (read.micro, 64)
                for row, position in enumerate(batch.positions_B.tolist()):
                    arrays = batch.ids_BT[row], batch.segments_BT[row], batch.offsets_BT[row], batch.num_bytes_B[row]
                    if position < 0:
                        assert not any(array.any() for array in arrays[1:])
                        continue
                    assert position in here and position not in found
                    found[position] = content(*arrays)
    return found


def each(make: Callable[[], SequenceStream]) -> Iterator[SequenceStream]:
    while True:
        yield make()


@RECIPES
@pytest.mark.parametrize(
    "read",
    [
        Read(1, 12, micro=12),
        Read(1, 12, micro=5),  # accumulated, the last micro-batch not full
        Read(2, 5, micro=1),
        Read(2, 16, micro=3, start=2),
        Read(3, 5),
        Read(4, 7, micro=3, steps=4),
        Read(4, 32, micro=2, start=1),
        Read(8, 12, micro=1, start=3, steps=5),
        Read(8, 12, micro=4, start=3, steps=5),  # five ranks have nothing to read
        Read(8, 40, micro=5, steps=2),
    ],
    ids=lambda read: f"{read.world_size}x{read.batch}x{read.micro}",
)
def test_every_layout_reads_the_same_tokens(runs: Callable[[Any], Runs], recipe: Any, read: Read) -> None:
    one = runs(recipe)
    assert read_all(each(one.open), read, one.skip) == one.expected(read.positions)


@pytest.mark.parametrize(
    ("read", "recipe"),
    [
        (Read(512, 7, micro=1, start=9, steps=2), EVERYTHING),
        (Read(512, 520, micro=1, steps=1), PLAIN),  # a second micro-batch, for eight ranks only
        (Read(512, 100, micro=3, start=1, steps=1), EVERYTHING),
    ],
    ids=["7", "520", "100"],
)
def test_512_ranks(runs: Callable[[Any], Runs], read: Read, recipe: Any) -> None:
    one = runs(recipe)
    shared = one.open()  # ranks look up their own positions only; here after one another in one stream, to save time
    assert read_all(each(lambda: shared), read, one.skip) == one.expected(read.positions)


def test_rows_without_a_position_have_no_targets(runs: Callable[[Any], Runs]) -> None:
    one, read, objective = runs(PLAIN), Read(8, 12, micro=4, steps=1), CausalObjective()
    whole = [objective.prepare(batch) for (batch,) in rank_batches(one.open(), Read(1, 12, micro=12, steps=1), 0)]
    parts = [[part for (part,) in rank_batches(one.open(), read, rank, objective.prepare)] for rank in range(8)]
    assert [(part.inputs["targets_BT"] >= 0).sum().item() > 0 for (part,) in parts] == [True] * 3 + [False] * 5
    assert [part.counts["causal"] for (part,) in parts[3:]] == [0] * 5
    assert [part.num_bytes for (part,) in parts[3:]] == [0.0] * 5
    assert sum(part.counts["causal"] for (part,) in parts) == whole[0].counts["causal"]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than this machine has cores
@pytest.mark.parametrize("workers", [1, 3])
def test_loader_processes_over_an_empty_cache(runs: Callable[[Any], Runs], workers: int) -> None:
    one, read = runs(EVERYTHING), Read(1, 12, micro=4, start=1, steps=9, workers=workers)
    assert read_all([one.open(None)], read, one.skip) == one.expected(read.positions)


@RECIPES
def test_streamed_equals_cached(runs: Callable[[Any], Runs], recipe: Any) -> None:
    one, read = runs(recipe), Read(3, 10, micro=2, steps=12)
    expected = one.expected(read.positions)
    assert read_all(each(lambda: one.open(None)), read, one.skip) == expected  # each rank tokenizes, as on nodes apart
    one.open("theirs").sequence(60)  # a cache that holds some of the chunks
    assert read_all(each(lambda: one.open("theirs")), read, one.skip) == expected
    assert read_all(each(one.open), read, one.skip) == expected


LEG = st.builds(
    lambda world_size, micro, steps: Read(world_size, 12, micro=micro, steps=steps),
    world_size=st.sampled_from([1, 2, 3, 4, 8]),
    micro=st.integers(1, 7),
    steps=st.integers(1, 5),
)

ACROSS_AN_EPOCH_END = [
    (Read(2, 12, micro=5, steps=4), False, 1),
    (Read(8, 12, micro=1, steps=5), True, 7),
    (Read(3, 12, micro=4, steps=5), False, 2),
]


@RECIPES
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(legs=ACROSS_AN_EPOCH_END)
@given(legs=st.lists(st.tuples(LEG, st.booleans(), st.integers(0, 7)), min_size=2, max_size=5))
def test_resumed_again_and_again_with_other_ranks(
    runs: Callable[[Any], Runs], tmp_path: Path, recipe: Any, legs: list[tuple[Read, bool, int]]
) -> None:
    one, step, ledger = runs(recipe), 0, None
    found: dict[int, Content] = {}
    for leg, cold, saver in legs:
        read = Read(leg.world_size, 12, leg.micro, start=step, steps=leg.steps)
        cache = f"cold-{read}-{len(found)}" if cold else "whole"
        streams = [one.open(cache, ledger) for _ in range(read.world_size)]
        part = read_all(streams, read, one.skip)
        assert not part.keys() & found.keys()
        found |= part
        step += read.steps
        cursor = kept_position(step * 12, one.skip)
        # Any rank may save: what it did not look up itself, it finds.
        saved = streams[saver % read.world_size].ledger_at(cursor)
        assert saved.text() == one.ledger_at(cursor).text()
        saved.save(tmp_path / "ledger.jsonl")
        ledger = Ledger.load(tmp_path / "ledger.jsonl")
    assert found == one.expected(range(step * 12))


@RECIPES
def test_resumed_at_every_position(runs: Callable[[Any], Runs], recipe: Any) -> None:
    one = runs(recipe)
    expected = one.expected(range(161))
    addresses = {k: one.address(kept_position(k, one.skip)) for k in range(161)}
    assert {epoch for epoch, _ in addresses.values()} >= {0, 1}
    for k in range(1, 160):
        stream = one.open(ledger=one.ledger_at(kept_position(k, one.skip)))
        position = kept_position(k, one.skip)
        assert content(*stream.sequence(position)) == expected[position]
    ends = [k for k in range(1, 160) if addresses[k - 1][0] < addresses[k][0]]
    assert ends
    for k in ends[:3]:  # where an epoch has just ended
        stream = one.open(None, one.ledger_at(kept_position(k, one.skip)))
        read = Read(1, 1, micro=1, start=k, steps=1)
        assert read_all([stream], read, one.skip) == one.expected(read.positions)


@RECIPES
def test_every_rank_saves_the_same_ledger(runs: Callable[[Any], Runs], recipe: Any) -> None:
    one, read = runs(recipe), Read(8, 12, micro=1, steps=8)
    cursor = kept_position(96, one.skip)
    ranks = [one.open() for _ in range(8)]
    for rank, stream in enumerate(ranks[:2]):
        assert list(rank_batches(stream, read, rank))
    ledgers = [stream.ledger_at(cursor) for stream in ranks]  # six have read nothing at all
    assert {ledger.text() for ledger in ledgers} == {one.ledger_at(cursor).text()}
    fresh = one.open(None)
    assert not fresh.ledger.entries("a")
    assert fresh.ledger_at(cursor).text() == ledgers[0].text()
    assert fresh.totals(cursor) == ranks[1].totals(cursor) and fresh.epochs_at(cursor) == ranks[0].epochs_at(cursor)


def test_what_is_expected_is_what_stands_at_kept_positions(runs: Callable[[Any], Runs]) -> None:
    one = runs(EVERYTHING)
    row: Row = one.open().sequence(0)
    assert one.expected([0]) == {0: content(*row)}
    assert one.expected([3]).keys() == {9} and one.expected([24, 25]).keys() == {31, 32}
