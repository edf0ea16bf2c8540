"""Pairs of sentences: what is cut where, what goes where, how often, and that nothing is lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lmssl.data.batch import SequenceBatch
from lmssl.objective.pairs import Paired, Pairs
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.tokenizer.words import WordStarts
from sequences import packed, segments_of

CLS, SEP = 2, 3
LENGTH = 64
Halves = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Tokenizer:
    return load_tokenizer(root / "tokenizer/wordpiece-8k")


def pairs(tokenizer: Tokenizer, task: str, seed: int = 7) -> Pairs:
    return Pairs(task, seed, WordStarts.of(tokenizer))


def rows(*lengths: list[int], position: int = 0) -> SequenceBatch:
    """[CLS] text [SEP] [SEP] in segments of the given lengths."""
    found = packed(*lengths, length=LENGTH, first=5, vocab_size=8000, position=position)
    for row, _, place in segments_of(found):
        found.ids_BT[row, place[0]], found.ids_BT[row, place[-2:]] = CLS, SEP
    return found


def halves(found: Paired) -> list[list[Halves]]:
    """A and B of every pair of each row, by its types; checks what stands around them."""
    listed: list[list[Halves]] = [[] for _ in found.types_BT]
    for row, _, place in segments_of(found.batch):
        ids, types = found.batch.ids_BT[row][place].tolist(), found.types_BT[row][place].tolist()
        second = types.index(1)
        assert types == [0] * second + [1] * (len(ids) - second)
        assert ids[0] == CLS and ids[second - 1] == SEP and ids[-1] == SEP and ids.count(SEP) == 2
        listed[row].append((ids[1 : second - 1], ids[second:-1]))
        assert found.batch.offsets_BT[row][place].tolist() == list(range(len(ids)))
    return listed


def targets(found: Paired) -> list[list[int]]:
    return [row[row >= 0].tolist() for row in found.targets_BP]


ROWS = ([20, 30, 14], [64], [10, 10, 10, 10, 10], [], [33, 21], [4, 60])


@pytest.mark.parametrize("task", ["order", "next"])
def test_every_token_stays_in_its_row(tokenizer: Tokenizer, task: str) -> None:
    before = rows(*ROWS)
    kept = before.ids_BT.copy()
    after = pairs(tokenizer, task).arrange(before, evaluation=False)
    assert np.array_equal(before.ids_BT, kept)
    assert np.array_equal(np.sort(after.batch.ids_BT), np.sort(kept))
    assert np.array_equal(after.batch.segments_BT == 0, before.segments_BT == 0)
    assert np.array_equal(after.batch.ids_BT[before.segments_BT == 0], kept[before.segments_BT == 0])
    assert not after.types_BT[before.segments_BT == 0].any()
    assert not after.batch.offsets_BT[before.segments_BT == 0].any()
    assert after.num_segments == 13
    assert after.places_BP.shape == (6, 12)


def test_the_halves_of_order_are_the_text_or_its_exchange(tokenizer: Tokenizer) -> None:
    before, seen = rows(*ROWS), []
    for seed in range(12):
        after = pairs(tokenizer, "order", seed).arrange(before, evaluation=False)
        assert np.array_equal(after.batch.segments_BT, before.segments_BT)
        found, wanted = halves(after), targets(after)
        for row, number, place in segments_of(before):
            text = before.ids_BT[row][place][1:-2].tolist()
            first, second = found[row][number - 1]
            if len(text) == 1:  # the segment of four tokens
                assert (first, second) == (text, [])
                continue
            target = wanted[row][number - 1 - (row == 5)]
            assert (second + first if target else first + second) == text
            seen.append(target)
        heads = [
            after.batch.ids_BT[row][place[w >= 0]]
            for row, (place, w) in enumerate(zip(after.places_BP, after.targets_BP, strict=True))
        ]
        assert all((ids == CLS).all() for ids in heads)
    assert 0.35 < np.mean(seen) < 0.65


def test_the_halves_of_next_come_from_the_same_row(tokenizer: Tokenizer) -> None:
    before = rows(*ROWS)
    plain = halves(_untouched(tokenizer, before))
    moved = []
    for seed in range(40):
        after = pairs(tokenizer, "next", seed).arrange(before, evaluation=False)
        found, wanted = halves(after), targets(after)
        assert [len(row) for row in wanted] == [3, 0, 5, 0, 2, 0]  # alone in a row there is nothing to exchange
        for row in (0, 2, 4):
            assert [first for first, _ in found[row]] == [first for first, _ in plain[row]]
            assert sorted(second for _, second in found[row]) == sorted(second for _, second in plain[row])
            for number, target in enumerate(wanted[row]):
                assert (found[row][number][1] != plain[row][number][1]) == bool(target)
            moved += wanted[row]
        assert found[1] == plain[1] and found[5] == plain[5]
    assert 0.4 < np.mean(moved) < 0.6


def _untouched(tokenizer: Tokenizer, before: SequenceBatch) -> Paired:
    """Pairs in the order of the text: of each segment by itself there is nothing to exchange."""
    alone = pairs(tokenizer, "next")
    found = alone.arrange(before, evaluation=False)
    for seed in range(60):
        found = pairs(tokenizer, "next", seed).arrange(before, evaluation=False)
        if not (found.targets_BP == 1).any():
            return found
    raise AssertionError("no seed leaves all pairs as they are")


def test_the_cut_is_the_word_start_nearest_to_the_middle(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.backend.get_vocab()
    word, tail = vocabulary["the"], next(token for name, token in vocabulary.items() if name.startswith("##"))
    for text, cut in (
        ([word] * 8, 4),
        ([word, word, word, tail, tail, tail, word, word], 2),
        ([word, tail, tail, tail, word, tail, tail, tail, word], 4),
        ([word, tail, tail, tail, tail], 2),  # one word: in the middle
        ([word, tail], 1),
    ):
        ids = np.array([[CLS, *text, SEP, SEP]])
        batch = SequenceBatch(
            ids, np.ones_like(ids, np.int32), np.arange(ids.size)[None], np.array([0]), np.array([9.0])
        )
        found = pairs(tokenizer, "next").arrange(batch, evaluation=False)
        assert halves(found) == [[(text[:cut], text[cut:])]]


@pytest.mark.parametrize("task", ["order", "next"])
def test_targets_are_balanced_and_fixed_by_the_position(tokenizer: Tokenizer, task: str) -> None:
    many = rows(*([[20, 30, 14]] * 800), position=100)
    made = pairs(tokenizer, task)
    whole = made.arrange(many, evaluation=False)
    part = SequenceBatch(**{f.name: getattr(many, f.name)[300:302] for f in dataclasses.fields(many)})
    again = made.arrange(part, evaluation=False)
    assert np.array_equal(again.batch.ids_BT, whole.batch.ids_BT[300:302])
    assert np.array_equal(again.targets_BP, whole.targets_BP[300:302])
    shares = whole.targets_BP[:, :3].mean(axis=0)
    assert (abs(shares - 0.5) < 0.07).all()
    held_out = made.arrange(many, evaluation=True)
    assert (held_out.targets_BP != whole.targets_BP).any()
