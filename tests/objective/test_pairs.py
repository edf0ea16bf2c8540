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
    texts = [[] for _ in ROWS]
    for row, _, place in segments_of(before):
        texts[row].append(before.ids_BT[row][place][1:-2].tolist())
    moved = []
    for seed in range(40):
        after = pairs(tokenizer, "next", seed).arrange(before, evaluation=False)
        found, wanted = halves(after), targets(after)
        assert [len(row) for row in wanted] == [3, 0, 5, 0, 2, 0]  # alone in a row there is nothing to exchange
        for row, pairs_of_row in enumerate(found):
            firsts, seconds = [first for first, _ in pairs_of_row], [second for _, second in pairs_of_row]
            assert firsts == [text[: len(first)] for text, first in zip(texts[row], firsts, strict=True)]
            own = [text[len(first) :] for text, first in zip(texts[row], firsts, strict=True)]
            assert sorted(seconds) == sorted(own)
            exchanged = [second != rest for second, rest in zip(seconds, own, strict=True)]
            assert exchanged == ([bool(target) for target in wanted[row]] or [False] * len(own))
            moved += wanted[row]
    assert 0.4 < np.mean(moved) < 0.6


def test_cuts_are_word_starts_and_every_one_has_its_turn(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.backend.get_vocab()
    word, tail = vocabulary["the"], next(token for name, token in vocabulary.items() if name.startswith("##"))
    for text, cuts in (
        ([word] * 8, {1, 2, 3, 4, 5, 6, 7}),
        ([word, word, word, tail, tail, tail, word, word], {1, 2, 6, 7}),
        ([word, tail, tail, tail, word, tail, tail, tail, word], {4, 8}),
        ([word, tail, tail, tail, tail], {1, 2, 3, 4}),  # one word: anywhere
        ([word, tail], {1}),
    ):
        ids = np.tile([CLS, *text, SEP, SEP], (300, 1))
        batch = SequenceBatch(
            ids, np.ones_like(ids, np.int32), np.tile(np.arange(ids.shape[1]), (300, 1)), np.arange(300), np.ones(300)
        )
        found = halves(pairs(tokenizer, "order").arrange(batch, evaluation=False))
        assert {min(len(first), len(text) - len(first)) for [(first, _)] in found} == {
            min(cut, len(text) - cut) for cut in cuts
        }
        kept = [first for [(first, second)] in found if first + second == text]
        assert {len(first) for first in kept} == cuts


@pytest.mark.parametrize("task", ["order", "next"])
def test_lengths_do_not_give_the_answer_away(tokenizer: Tokenizer, task: str) -> None:
    drawn = np.random.default_rng(3).lognormal(2.6, 0.6, (3000, 3)).astype(int).clip(5, 20)
    found = pairs(tokenizer, task).arrange(rows(*drawn.tolist()), evaluation=False)
    sizes, answers = [], []
    for listed, wanted in zip(halves(found), targets(found), strict=True):
        sizes += [(len(first), len(second)) for first, second in listed]
        answers += wanted
    size_N2, answer_N = np.array(sizes), np.array(answers)
    assert len(size_N2) == len(answer_N) == 9000
    # A table of answers by both lengths, learned from one half of the pairs, is as good as a coin on the other half.
    cell_N = size_N2[:, 0] * 100 + size_N2[:, 1]
    learned, asked = cell_N[:4500], cell_N[4500:]
    balance = np.bincount(learned, 2 * answer_N[:4500] - 1, minlength=10_000)
    accuracy = np.mean((balance[asked] > 0) == answer_N[4500:])
    assert accuracy < 0.5 + 4 * 0.5 / 4500**0.5
    short_N = size_N2[:, 0] < size_N2[:, 1]
    assert abs(answer_N[short_N].mean() - answer_N[~short_N].mean()) < 0.06


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
