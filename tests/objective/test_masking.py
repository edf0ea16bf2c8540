"""What is masked: exact rates, uniform choices, whole words, bounded spans, and nothing but the position decides."""

from __future__ import annotations

import dataclasses
import pickle
from itertools import combinations
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from lmssl.errors import TokenizerError
from lmssl.model.head import IGNORE
from lmssl.objective.masking import Draws, Masked, Masking, ordinary_tokens
from lmssl.objective.random_spans import SpanLengths
from lmssl.recipe.objective import MaskedObjective
from lmssl.tokenizer.load import Tokenizer, load_tokenizer

IntArray = npt.NDArray[np.int64]
STRATEGIES = ("token", "whole_word", "span")
LENGTH, ROWS = 64, 2048
PAD, UNK, CLS, SEP, MASK = range(5)
UNSPACED = "今天天气很好，我们去公园吧！他说。ภาษาไทยไม่มีช่องว่างระหว่างคำ สวัสดีครับ ผมชื่อสมชาย"


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Tokenizer:
    return load_tokenizer(root / "tokenizer/wordpiece-8k")


@pytest.fixture(scope="module")
def byte_level(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer with a mask token."""
    folder = tmp_path_factory.mktemp("byte-level")
    backend = Backend.from_file(str(root / "tokenizer/bpe-4k/tokenizer.json"))
    backend.add_special_tokens(["<mask>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"mask_token": "<mask>"}', encoding="utf-8")
    return load_tokenizer(folder)


def masking(tokenizer: Tokenizer, seed: int = 1, num_positions: int = 1000, **section: Any) -> Masking:
    return Masking.of(MaskedObjective(kind="masked", **section), tokenizer, seed, num_positions)


def rows(tokenizer: Tokenizer, count: int = ROWS, length: int = LENGTH) -> tuple[IntArray, npt.NDArray[np.int32]]:
    """Rows of two segments of text between [CLS] and [SEP], an unknown token in the first, padding at the end."""
    text = " ".join(topics[name] for name in sorted(topics)[:12])
    words = tokenizer.backend.encode(text, add_special_tokens=False).ids
    ids = np.resize(np.array(words, dtype=np.int64), (count, length))
    segments = np.ones((count, length), np.int32)
    cut = length // 3
    segments[:, cut:], segments[:, -5:] = 2, 0
    ids[:, [0, cut]], ids[:, [cut - 1, -6]], ids[:, 4], ids[:, -5:] = CLS, SEP, UNK, PAD
    return ids, segments


def apply(masking: Masking, ids: IntArray, segments: npt.NDArray[np.int32], *, evaluation: bool = False) -> Masked:
    return masking.mask(ids, segments, np.arange(len(ids)), evaluation=evaluation)


def chosen(masked: Masked) -> npt.NDArray[np.bool_]:
    """Which tokens are targets, [B, T]."""
    found = np.zeros(masked.ids_BT.shape, bool)
    there = masked.targets_BC != IGNORE
    found[np.nonzero(there)[0], masked.places_BC[there]] = True
    return found


def surprise(counts: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Chi-square against the expected counts, as standard deviations above its mean."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def runs(marks: npt.NDArray[np.bool_]) -> IntArray:
    """Lengths of the runs of marked tokens of all rows."""
    edges = np.diff(np.pad(marks, ((0, 0), (1, 1))).astype(int), axis=1)
    return np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.3, 0.77])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_share_of_targets_is_the_rate_and_fits_the_capacity(tokenizer: Tokenizer, strategy: str, rate: float) -> None:
    ids, segments = rows(tokenizer)
    masks = masking(tokenizer, rate=rate, strategy=strategy)
    counts = chosen(apply(masks, ids, segments)).sum(axis=1)
    budget = rate * (LENGTH - 5 - 5)  # padding; two [CLS], two [SEP] and [UNK]
    assert abs(counts.mean() - budget) < 4 * max(counts.std(), 0.1) / np.sqrt(ROWS)
    assert counts.max() <= masks.capacity(LENGTH, False)
    if strategy == "token":
        assert set(counts.tolist()) == {int(budget), int(budget) + 1}
    assert counts.max() <= np.ceil(budget) + {"token": 0, "whole_word": 15, "span": 9}[strategy]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_short_rows_have_the_rate_on_average_too(tokenizer: Tokenizer, strategy: str) -> None:
    ids, segments = rows(tokenizer, 20_000, 18)
    ids[:, 1:7], segments[:, 5:] = ids[0, 1:7], 0  # [CLS] and four tokens, one of them unknown
    counts = chosen(apply(masking(tokenizer, strategy=strategy), ids, segments)).sum(axis=1)
    assert abs(counts.mean() - 0.3 * 3) < 4 * counts.std() / np.sqrt(len(counts))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_special_tokens_and_padding_are_never_targets(tokenizer: Tokenizer, strategy: str) -> None:
    ids, segments = rows(tokenizer)
    ids[:, 7] = MASK
    for evaluation in (False, True):
        masked = apply(masking(tokenizer, rate=0.9, strategy=strategy), ids, segments, evaluation=evaluation)
        marks = chosen(masked)
        assert not marks[(ids <= MASK) | (segments == 0)].any()
        assert marks[(ids > MASK) & (segments != 0)].mean() > (0.1 if evaluation else 0.85)
        assert (masked.ids_BT == ids)[~marks].all()


def test_targets_are_what_stood_there_in_ascending_order(tokenizer: Tokenizer) -> None:
    ids, segments = rows(tokenizer, 64)
    before = ids.copy()
    masks = masking(tokenizer)
    masked = apply(masks, ids, segments)
    assert (ids == before).all()
    assert masked.places_BC.shape == masked.targets_BC.shape == (64, masks.capacity(LENGTH, False))
    assert masked.ids_BT.dtype == masked.places_BC.dtype == masked.targets_BC.dtype == np.int64
    for row, (places, targets) in enumerate(zip(masked.places_BC, masked.targets_BC, strict=True)):
        count = int((targets != IGNORE).sum())
        assert count > 0 and (np.diff(places[:count]) > 0).all()
        assert targets[:count].tolist() == before[row, places[:count]].tolist()
        assert (places[count:] == 0).all() and (targets[count:] == IGNORE).all()


@pytest.mark.parametrize("strategy", ["token", "whole_word"])
def test_replacements_have_their_shares(tokenizer: Tokenizer, strategy: str) -> None:
    ids, segments = rows(tokenizer)
    masked = apply(masking(tokenizer, strategy=strategy, mask_share=0.7, random_share=0.2), ids, segments)
    marks = chosen(masked)
    found, before = masked.ids_BT[marks], ids[marks]
    num_mask, num_kept = (found == MASK).sum(), (found == before).sum()
    counts = [num_mask, num_kept, len(found) - num_mask - num_kept]
    assert surprise(counts, len(found) * np.array([0.7, 0.1, 0.2])) < 4  # a random token is hardly ever the same


def test_a_span_is_replaced_in_one_way(tokenizer: Tokenizer) -> None:
    ids, segments = rows(tokenizer)
    masked = apply(masking(tokenizer, strategy="span"), ids, segments)
    marks = chosen(masked)
    kind = np.where(masked.ids_BT == MASK, 0, np.where(masked.ids_BT == ids, 1, 2))
    together = marks[:, 1:] & marks[:, :-1]
    assert together.sum() > 5000
    same = (kind[:, 1:] == kind[:, :-1])[together]
    assert same.mean() > 0.998  # a random token may be the one that stood there
    begins = marks & ~np.pad(marks, ((0, 0), (1, 0)))[:, :-1]
    counts = np.bincount(kind[begins], minlength=3)
    assert surprise(counts, counts.sum() * np.array([0.8, 0.1, 0.1])) < 4


def test_words_are_not_replaced_in_one_way(tokenizer: Tokenizer) -> None:
    ids, segments = rows(tokenizer)
    masks = masking(tokenizer, strategy="whole_word", mask_share=0.5, random_share=0.0)
    masked = apply(masks, ids, segments)
    marks = chosen(masked)
    inside = marks & ~wordpiece_starts(tokenizer, ids)
    agree = ((masked.ids_BT == MASK)[:, 1:] == (masked.ids_BT == MASK)[:, :-1])[inside[:, 1:] & marks[:, :-1]]
    assert len(agree) > 300 and abs(agree.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(agree))


def wordpiece_starts(tokenizer: Tokenizer, ids: IntArray) -> npt.NDArray[np.bool_]:
    names = [str(tokenizer.backend.id_to_token(token)) for token in range(tokenizer.num_tokens)]
    return np.array([not name.startswith("##") for name in names])[ids]


def test_random_tokens_are_uniform_over_ordinary_ones(tokenizer: Tokenizer) -> None:
    ordinary = np.zeros(tokenizer.num_tokens, bool)
    ordinary[[7, 8, 100, 101, 102, 4000, 8191]] = True
    masks = dataclasses.replace(masking(tokenizer, mask_share=0.0, random_share=1.0), ordinary_V=ordinary)
    ids = np.full((ROWS, LENGTH), 8)
    masked = apply(masks, ids, np.ones_like(ids, dtype=np.int32))
    found = np.bincount(masked.ids_BT[chosen(masked)], minlength=tokenizer.num_tokens)
    assert found[~ordinary].sum() == 0
    assert surprise(found[ordinary], np.full(7, found.sum() / 7)) < 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_targets_are_uniform_over_places(tokenizer: Tokenizer, strategy: str) -> None:
    ids, segments = rows(tokenizer, 20_000)
    marks = chosen(apply(masking(tokenizer, strategy=strategy), ids, segments))
    maskable = (ids[0] > MASK) & (segments[0] != 0)
    counts = marks.sum(axis=0)[maskable]
    sigma = np.sqrt(len(ids) * 0.3 * 0.7)
    # At a segment's ends spans are cut and so a little more often the one that is left out: by less than 2 %.
    assert np.abs(counts - counts.mean()).max() < 4.5 * sigma + (0.02 * counts.mean() if strategy == "span" else 0)


def test_every_set_of_places_is_as_likely(tokenizer: Tokenizer) -> None:
    ids = np.full((20_000, 6), 100)
    marks = chosen(apply(masking(tokenizer, rate=0.5), ids, np.ones_like(ids, dtype=np.int32)))
    codes, counts = np.unique(marks @ (1 << np.arange(6)), return_counts=True)
    assert sorted(codes.tolist()) == sorted(sum(1 << i for i in places) for places in combinations(range(6), 3))
    assert surprise(counts, np.full(20, 1000.0)) < 4


def test_words_are_masked_whole(tokenizer: Tokenizer, byte_level: Tokenizer) -> None:
    spaced = " ".join(topics[name] for name in sorted(topics)[:12])
    for model, text in ((tokenizer, spaced), (byte_level, spaced), (byte_level, UNSPACED * 60)):
        encoding = model.backend.encode(text, add_special_tokens=False)
        count = len(encoding.ids) // LENGTH
        ids = np.array(encoding.ids[: count * LENGTH]).reshape(count, LENGTH)
        words = np.array(encoding.word_ids[: count * LENGTH]).reshape(count, LENGTH)
        masks = masking(model, strategy="whole_word", rate=0.4)
        marks = chosen(apply(masks, ids, np.ones_like(ids, dtype=np.int32)))
        several = 0
        for row in range(count):
            inner = [word for word in np.unique(words[row]) if word not in words[row, [0, -1]]]  # not cut by the row
            for word in inner:
                tokens = marks[row, (words[row] == word)]
                if len(tokens) <= masks.max_word_tokens:
                    assert tokens.all() or not tokens.any()
                    several += len(tokens) > 1
        assert several > 100


def test_words_of_any_length_are_as_likely(byte_level: Tokenizer) -> None:
    text = " ".join(topics[name] for name in sorted(topics)[:40])
    encoding = byte_level.backend.encode(text, add_special_tokens=False)
    count = len(encoding.ids) // 256
    ids = np.array(encoding.ids[: count * 256]).reshape(count, 256)
    masks = masking(byte_level, strategy="whole_word")
    segments = np.ones_like(ids, dtype=np.int32)
    found = [masks.mask(ids, segments, np.arange(count) + shift * count, evaluation=False) for shift in range(8)]
    marks = np.concatenate([chosen(masked) for masked in found])
    assert masks.words is not None
    starts = masks.words.starts(ids, segments)
    group = np.cumsum(starts.ravel()) - 1
    length = np.tile(np.bincount(group)[group].reshape(ids.shape), (8, 1))
    for size in (1, 2, 3):
        share = marks[length == size].mean()
        assert abs(share - 0.3) < 0.01, (size, share)


def test_long_words_are_masked_in_bounded_groups(tokenizer: Tokenizer) -> None:
    inner = tokenizer.backend.token_to_id("##s")
    ids = np.full((4000, 50), inner)  # one word of fifty tokens: groups of 16, 16, 16 and 2
    masks = masking(tokenizer, strategy="whole_word", rate=0.3)
    marks = chosen(apply(masks, ids, np.ones_like(ids, dtype=np.int32)))
    for first, stop in ((0, 16), (16, 32), (32, 48), (48, 50)):
        group = marks[:, first:stop]
        assert (group.all(axis=1) == group.any(axis=1)).all()
        assert 0.2 < group[:, 0].mean() < 0.4
    assert marks.sum(axis=1).max() <= masks.capacity(50, False) == 15 + 15
    assert abs(marks.mean() - 0.3) < 4 * marks.mean(axis=1).std() / np.sqrt(len(ids))


def test_spans_have_geometric_lengths_and_never_touch(tokenizer: Tokenizer) -> None:
    ids = np.full((4000, 256), 100)
    segments = np.ones_like(ids, dtype=np.int32)
    masks = masking(tokenizer, strategy="span", mean_span_tokens=4.0, max_span_tokens=8, rate=0.2)
    found = runs(chosen(apply(masks, ids, segments)))
    lengths = SpanLengths(4.0, 8)
    assert found.max() == 8  # touching ones would make longer runs
    assert abs(found.mean() - lengths.mean_tokens) < 0.02 * lengths.mean_tokens
    shares = np.bincount(found, minlength=9)[1:] / len(found)
    assert np.abs(shares - lengths.probabilities).max() < 0.01  # the row's ends cut some
    weights = [0.75**k for k in range(8)]
    assert lengths.mean_tokens == pytest.approx(sum(k * weights[k - 1] for k in range(1, 9)) / sum(weights))


def test_spans_stay_inside_segments_and_off_special_tokens(tokenizer: Tokenizer) -> None:
    ids = np.full((3000, 60), 100)
    segments = np.ones_like(ids, dtype=np.int32)
    segments[:, 30:] = 2  # without special tokens between
    ids[:, 12] = SEP
    masks = masking(tokenizer, strategy="span", mean_span_tokens=6.0, mask_share=1.0, random_share=0.0, rate=0.5)
    masked = apply(masks, ids, segments)
    marks = chosen(masked)
    assert not marks[:, 12].any()
    crossing = marks[:, 29] & marks[:, 30]
    # Two spans may meet at a segment's end by chance; one that went through would make it far more common.
    assert abs(crossing.mean() - 0.25) < 0.05
    assert runs(marks[:, :12]).max() <= 10 and runs(marks[:, 30:]).max() <= 10


def test_rate_follows_the_schedule_by_position(tokenizer: Tokenizer) -> None:
    masks = masking(tokenizer, rate=0.3, final_rate=0.15, decay_ratio=0.25, num_positions=1000)
    positions = np.array([0, 500, 750, 875, 999, 1000, 5000])
    assert masks.rates(positions, evaluation=False) == pytest.approx([0.3, 0.3, 0.3, 0.225, 0.1506, 0.15, 0.15])
    assert masks.rates(positions, evaluation=True).tolist() == [0.15] * 7
    assert masking(tokenizer, rate=0.4).rates(positions, evaluation=False).tolist() == [0.4] * 7
    rising = masking(tokenizer, rate=0.1, final_rate=0.5, num_positions=100)
    ids = np.full((100, 200), 100)
    counts = chosen(apply(rising, ids, np.ones_like(ids, dtype=np.int32))).sum(axis=1)
    assert np.abs(counts - 200 * (0.1 + 0.4 * np.arange(100) / 100)).max() < 1.001
    assert rising.capacity(200, False) == 100 and rising.capacity(200, True) == 30


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_depend_on_seed_position_and_purpose_alone(tokenizer: Tokenizer, strategy: str) -> None:
    ids, segments = rows(tokenizer, 48)
    masks = masking(tokenizer, strategy=strategy)
    whole = apply(masks, ids, segments)
    again = pickle.loads(pickle.dumps(masks))
    for size in (1, 7, 16):
        for first in range(0, 48, size):
            part = slice(first, first + size)
            found = again.mask(ids[part], segments[part], np.arange(48)[part], evaluation=False)
            for name in Masked._fields:
                np.testing.assert_array_equal(getattr(found, name), getattr(whole, name)[part])
    same = np.repeat(ids[:1], 48, axis=0)
    marks = chosen(apply(masks, same, np.repeat(segments[:1], 48, axis=0)))
    assert len(np.unique(marks, axis=0)) == 48  # the same text at other positions, thus in other epochs
    other = chosen(apply(masking(tokenizer, seed=2, strategy=strategy), ids, segments))
    held_out = chosen(apply(dataclasses.replace(masks, rate=0.15), ids, segments, evaluation=True))
    trained = chosen(apply(dataclasses.replace(masks, rate=0.15), ids, segments))
    for left, right in ((other, chosen(whole)), (held_out, trained)):
        assert (left == right).all(axis=1).sum() == 0


def test_evaluation_masks_stay_the_same_over_the_run(tokenizer: Tokenizer) -> None:
    ids, segments = rows(tokenizer, 16)
    first = apply(masking(tokenizer), ids, segments, evaluation=True)
    for changes in ({"rate": 0.5}, {"final_rate": 0.1}, {"num_positions": 7}):
        found = apply(masking(tokenizer, **changes), ids, segments, evaluation=True)
        assert all((a == b).all() for a, b in zip(first, found, strict=True))


def test_empty_rows_have_no_targets(tokenizer: Tokenizer) -> None:
    ids, segments = rows(tokenizer, 3)
    ids[1], segments[1] = PAD, 0
    for strategy in STRATEGIES:
        masks = masking(tokenizer, strategy=strategy)
        masked = masks.mask(ids, segments, np.array([5, -1, 6]), evaluation=False)
        assert chosen(masked).any(axis=1).tolist() == [True, False, True]
        assert (masked.ids_BT[1] == PAD).all()
        empty = masks.mask(ids[1:2], segments[1:2], np.array([-1]), evaluation=True)
        assert (empty.targets_BC == IGNORE).all()


def test_hash_is_uniform_and_its_uses_are_independent() -> None:
    draws = Draws(3, "masks", np.arange(512))
    order, kinds = draws.bits("order", 512), draws.bits("kinds", 512)
    for shift in (0, 8, 24, 48, 56):
        values = (order >> np.uint64(shift)).astype(np.int64) & 0xFF
        assert surprise(np.bincount(values.ravel(), minlength=256), np.full(256, values.size / 256)) < 4
    top, other = (order >> np.uint64(60)).astype(int), (kinds >> np.uint64(60)).astype(int)
    pairs = {
        "uses": top * 16 + other,
        "neighbours": top[:, 1:] * 16 + top[:, :-1],
        "positions": top[1:] * 16 + top[:-1],
        "seeds": top * 16 + (Draws(4, "masks", np.arange(512)).bits("order", 512) >> np.uint64(60)).astype(int),
        "diagonal": top[1:, 1:] * 16 + top[:-1, :-1],
    }
    for name, values in pairs.items():
        assert surprise(np.bincount(values.ravel(), minlength=256), np.full(256, values.size / 256)) < 4, name
    assert len(np.unique(order)) == order.size
    some = draws.at("order", np.array([3, 511]), np.array([0, 77]))
    assert some.tolist() == [order[3, 0], order[511, 77]]


def test_ordinary_tokens_are_those_of_text(tokenizer: Tokenizer, byte_level: Tokenizer, tmp_path: Path) -> None:
    assert np.flatnonzero(~ordinary_tokens(tokenizer)).tolist() == [PAD, UNK, CLS, SEP, MASK]
    assert np.flatnonzero(~ordinary_tokens(byte_level)).tolist() == [0, 1, 4096]
    backend = Backend(models.WordLevel({"a": 0, "b": 3, "<unk>": 1, "<mask>": 5}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_tokens(["word"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": "<mask>", "unk_token": "<unk>"}', encoding="utf-8")
    found = np.flatnonzero(ordinary_tokens(load_tokenizer(tmp_path)))
    assert found.tolist() == [0, 3, load_tokenizer(tmp_path).backend.token_to_id("word")]  # 2 is nobody's id


def test_a_tokenizer_without_a_mask_token_is_an_error(root: Path) -> None:
    with pytest.raises(TokenizerError, match="has no mask token") as raised:
        masking(load_tokenizer(root / "tokenizer/bpe-4k"))
    assert "mask_token" in str(raised.value.remedy)


def test_a_tokenizer_of_special_tokens_only_is_an_error(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"<mask>": 0}, unk_token="<mask>"))
    backend.add_special_tokens(["<mask>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": "<mask>"}', encoding="utf-8")
    with pytest.raises(TokenizerError, match="none can be hidden"):
        masking(load_tokenizer(tmp_path))


def test_whole_words_of_a_tokenizer_that_shows_none_are_an_error(tmp_path: Path) -> None:
    backend = Backend(models.BPE({"a": 0, "<mask>": 1}, []))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": "<mask>"}', encoding="utf-8")
    assert masking(load_tokenizer(tmp_path)).capacity(10, False) == 3
    with pytest.raises(TokenizerError, match="do not show where words begin"):
        masking(load_tokenizer(tmp_path), strategy="whole_word")
