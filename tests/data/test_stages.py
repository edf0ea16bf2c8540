import json
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmssl.data.ledger import Ledger
from lmssl.data.order import Order
from lmssl.data.stages import begun_stages, limited_shares, plan_stages, tempered_weights
from lmssl.data.stream import SequenceStream
from lmssl.errors import DataError
from lmssl.recipe.batches import BatchPlan
from lmssl.recipe.data import DataSection

Open = Callable[..., SequenceStream]
LENGTH = 64


def section(corpora: dict[str, Any], **fields: Any) -> DataSection:
    mixture = [{"name": name, "kind": "text", "path": name, **keys} for name, keys in corpora.items()]
    return DataSection.model_validate({"sequence_length": LENGTH, "mixture": mixture, "block_sequences": 16, **fields})


def stage(position: int, **weights: float) -> dict[str, Any]:
    return {"from_tokens": position * LENGTH, "weights": weights}


def no_sizes(corpus: str) -> int:
    raise AssertionError(f"the size of {corpus} is not needed")


def shares(order: Order, first: int, stop: int) -> Counter[str]:
    return Counter(order.locate(position)[0] for position in range(first, stop))


def test_later_stages_have_their_own_exact_shares() -> None:
    recipe = section({"a": {}, "b": {}}, stages=[stage(100, a=0.2, b=0.8), stage(260, a=1)])
    order = Order(plan_stages(recipe, [0.5, 0.5], seed=1, num_sequences=no_sizes), 1)
    assert [found.first_position for found in order.stages] == [0, 100, 260]
    for start in range(100, 260, 16):
        assert abs(shares(order, start, start + 16)["a"] - 3.2) <= 1
    assert shares(order, 100, 260) == {"a": 32, "b": 128}
    assert shares(order, 260, 400) == {"a": 140}
    assert order.counts_before(260) == {"a": 50 + 32, "b": 50 + 128}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_across_stages_every_corpus_is_read_in_order_without_gaps(data: st.DataObject) -> None:
    names = ["a", "b", "c", "d"][: data.draw(st.integers(1, 4))]
    weights = st.lists(st.integers(0, 20), min_size=len(names), max_size=len(names)).filter(any)
    starts = sorted(data.draw(st.sets(st.integers(1, 150), max_size=3)))
    stages = [stage(start, **dict(zip(names, data.draw(weights), strict=True))) for start in starts]
    recipe = section({name: {} for name in names}, stages=stages, block_sequences=data.draw(st.integers(1, 40)))
    seed = data.draw(st.integers(0, 99))
    order = Order(plan_stages(recipe, data.draw(weights), seed=seed, num_sequences=no_sizes), seed)
    seen: dict[str, list[int]] = {name: [] for name in names}
    for position in range(200):
        assert order.counts_before(position) == {name: len(ks) for name, ks in seen.items()}
        corpus, k = order.locate(position)
        seen[corpus].append(k)
    assert all(sorted(ks) == list(range(len(ks))) for ks in seen.values())


def test_no_document_comes_twice_in_an_epoch_across_a_stage(open_stream: Open, jsonl: Any, tokenizer: Any) -> None:
    corpora = jsonl("a", weight=1), jsonl("b", count=200, seed=1, weight=0)
    stream = open_stream(*corpora, packing="none", validation=None, stages=[stage(112, a=0.5, b=0.5)])
    sizes = stream.num_sequences_per_epoch()
    texts: dict[str, list[str]] = {"a": [], "b": []}
    position = 0
    while any(len(texts[name]) < sizes[name] for name in texts):
        corpus = stream.address(position).corpus
        assert corpus == "a" or position >= 112
        ids, segments, _, _ = stream.sequence(position)
        texts[corpus].append(tokenizer.backend.decode(ids[segments > 0].tolist()))
        position += 1
    for name, count in {"a": 400, "b": 200}.items():
        # Documents are numbered at their start; a sequence without a number is the rest of a long one.
        numbers = [re.match(r"\d+-\d+ ", text) for text in texts[name][: sizes[name]]]
        begun = Counter(found.group() for found in numbers if found)
        assert len(begun) == count and set(begun.values()) == {1}, name


def test_only_corpora_of_this_and_the_next_stage_are_built(open_stream: Open, jsonl: Any) -> None:
    later = [stage(32, a=1), stage(64, b=1)]
    stream = open_stream(jsonl("a", weight=1), jsonl("b", seed=1, weight=0), stages=later)
    stream.require_batch(4)
    stream.build_ahead(0)
    assert stream.ledger.entries("a") and not stream.ledger.entries("b")
    stream.build_ahead(32)
    assert stream.ledger.entries("b")


def test_a_corpus_of_a_later_stage_is_evaluated_on(open_stream: Open, jsonl: Any) -> None:
    stream = open_stream(
        *(jsonl("a", weight=1), jsonl("b", seed=1, weight=0)),
        stages=[stage(64, a=0.5, b=0.5)],
        validation={"ratio": 0.2, "tokens": 600},
    )
    assert [(split.corpus, split.num_tokens) for split in stream.validation()] == [("a", 600), ("b", 300)]


def test_temperature() -> None:
    # 0.9 and 0.1 to the power 1/2, normalised: 3 to 1.
    assert [float(weight) for weight in tempered_weights([0.9, 0.1], 2)] == pytest.approx([0.75, 0.25])
    assert tempered_weights([7, 3], None) == [7, 3]
    assert [float(weight) for weight in tempered_weights([7, 3], 1)] == pytest.approx([0.7, 0.3])
    assert [float(w) for w in tempered_weights([10**12, 1, 0], 1e9)] == pytest.approx([0.5, 0.5, 0])


def test_temperature_decides_the_order_in_every_stage() -> None:
    recipe = section({"a": {}, "b": {}}, temperature=2, stages=[stage(160, a=1, b=9)])
    order = Order(plan_stages(recipe, [0.9, 0.1], seed=1, num_sequences=no_sizes), 1)
    assert shares(order, 0, 160) == {"a": 120, "b": 40}
    assert shares(order, 160, 320) == {"a": 40, "b": 120}


@given(st.data())
def test_limited_shares(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    sized = st.lists(st.integers(0, 50).map(Fraction), min_size=count, max_size=count)
    weights, num_positions = data.draw(sized.filter(any)), data.draw(st.integers(1, 100))
    room = data.draw(st.lists(st.none() | st.integers(-5, 60).map(Fraction), min_size=count, max_size=count))
    found = limited_shares(weights, room, num_positions)
    used = [most for most, weight in zip(room, weights, strict=True) if weight]
    if None not in used and sum(max(most, Fraction(0)) for most in used if most is not None) < num_positions:
        assert found is None
        return
    assert found is not None and sum(found) == 1
    free = set()
    for share, weight, most in zip(found, weights, room, strict=True):
        assert not share or weight
        if most is not None and share * num_positions >= max(most, Fraction(0)):
            assert share * num_positions == max(most, Fraction(0)) or not weight
        elif weight:
            free.add(share / weight)
    assert len(free) <= 1  # what is not full keeps its proportion


def test_a_corpus_is_read_at_most_so_often(open_stream: Open, jsonl: Any) -> None:
    small, big = jsonl("small", count=120, weight=0.5, max_epochs=2), jsonl("big", count=900, seed=1, weight=0.5)
    stream = open_stream(small, big, batches=BatchPlan.even(1, num_steps=400))
    exact = stream.num_sequences_per_epoch()["small"]
    assert stream.order.counts_before(400)["small"] == pytest.approx(2 * exact, rel=0.3)
    assert stream.epochs_at(400)["small"] == pytest.approx(2, rel=0.3)
    assert open_stream(small, big).order.counts_before(400)["small"] == 200  # without a length no limit applies
    unlimited = open_stream(jsonl("small", count=120, weight=0.5), big, batches=BatchPlan.even(1, num_steps=400))
    assert unlimited.order.counts_before(400)["small"] == 200


def test_a_limit_that_one_window_decides_is_exact(open_stream: Open, jsonl: Any) -> None:
    tiny, big = jsonl("tiny", count=40, weight=0.9, max_epochs=1.5), jsonl("big", count=900, seed=1, weight=0.1)
    stream = open_stream(tiny, big, batches=BatchPlan.even(1, num_steps=320), chunk_bytes=1 << 20)
    exact = stream.num_sequences_per_epoch()["tiny"]
    assert stream.order.counts_before(320)["tiny"] == pytest.approx(1.5 * exact, abs=1)


def test_later_stages_get_what_earlier_ones_left() -> None:
    recipe = section({"a": {"max_epochs": 1}, "b": {}}, stages=[stage(160, a=1, b=1)])
    order = Order(
        plan_stages(recipe, [1, 1], seed=1, batches=BatchPlan.even(1, num_steps=320), num_sequences=lambda _: 100), 1
    )
    assert order.counts_before(160) == {"a": 80, "b": 80}
    assert order.counts_before(320) == {"a": 100, "b": 220}


def test_too_little_text_for_the_limits_names_the_longest_run() -> None:
    recipe = section({"a": {"max_epochs": 2}, "b": {"max_epochs": 1}})

    def plan(num_positions: int) -> Any:
        return plan_stages(
            recipe,
            [1, 1],
            seed=1,
            batches=BatchPlan.even(16, sequence_length=LENGTH, num_steps=num_positions // 16),
            num_sequences=lambda _: 33,
        )

    with pytest.raises(DataError, match=f"last for {99 * LENGTH} tokens only") as caught:
        plan(112)
    assert f"lower train.tokens to at most {96 * LENGTH}" in str(caught.value)
    assert plan(96)


def test_a_limit_needs_a_size(open_stream: Open, jsonl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from lmssl.data import stream as module

    units = module.list_units
    monkeypatch.setattr(
        module, "list_units", lambda *args, **keys: tuple(replace(unit, num_bytes=0) for unit in units(*args, **keys))
    )
    with pytest.raises(DataError, match="size is not known in advance") as caught:
        open_stream(
            jsonl("a", weight=1, max_epochs=1), jsonl("b", seed=1, weight=1), batches=BatchPlan.even(1, num_steps=50)
        )
    assert "max_epochs: null" in str(caught.value)


def reopened(recipe: DataSection, ledger: Ledger, read_positions: int | None) -> tuple[Any, ...]:
    return begun_stages(ledger, recipe, read_positions)


def test_stages_ahead_of_the_run_may_change_and_those_behind_may_not() -> None:
    corpora: dict[str, Any] = {"a": {}, "b": {}}
    recipe = section(corpora, stages=[stage(32, b=1), stage(96, a=1)])
    stages = plan_stages(recipe, [1, 1], seed=1, num_sequences=no_sizes)
    ledger = Ledger(
        stages, {"data.stages": json.loads(json.dumps([[32 * LENGTH, {"b": 1.0}], [96 * LENGTH, {"a": 1.0}]]))}
    )
    assert reopened(recipe, ledger, None) == reopened(recipe, ledger, 40) == stages
    other = section(corpora, stages=[stage(32, b=1), stage(80, a=1, b=1)])
    assert reopened(other, ledger, 80) == stages[:2]
    assert reopened(section(corpora, stages=[stage(32, b=1)]), ledger, 96) == stages[:2]
    for refused, at in (
        (other, 81),
        (other, None),
        (section(corpora), 33),
        (section(corpora, stages=[stage(32, a=1)]), 40),
    ):
        with pytest.raises(DataError, match=r"data\.stages changed for a part of the run") as caught:
            reopened(refused, ledger, at)
        assert "2048" in str(caught.value) and caught.value.remedy
    assert reopened(section(corpora), ledger, 32) == stages[:1]


def test_a_continued_stream_equals_one_with_the_stage_from_the_start(
    open_stream: Open, jsonl: Any, tmp_path: Path
) -> None:
    corpora = jsonl("a", weight=1), jsonl("b", seed=1, weight=1)
    first = open_stream(*corpora)
    first.ledger_at(64).save(tmp_path / "ledger")
    later = [stage(64, b=1)]
    with pytest.raises(DataError, match=r"data\.stages changed"):
        open_stream(*corpora, stages=later, ledger=Ledger.load(tmp_path / "ledger"))
    with pytest.raises(DataError, match=r"before position 65"):
        open_stream(*corpora, stages=later, ledger=Ledger.load(tmp_path / "ledger"), read_positions=65)
    continued = open_stream(*corpora, stages=later, ledger=Ledger.load(tmp_path / "ledger"), read_positions=64)
    whole = open_stream(*corpora, stages=later)
    assert [continued.address(p) for p in range(120)] == [whole.address(p) for p in range(120)]
    assert continued.ledger_at(120).text() == whole.ledger_at(120).text()
    assert [first.address(p) for p in range(64)] == [whole.address(p) for p in range(64)]


def test_changed_temperature_or_limits_are_refused_by_name(open_stream: Open, jsonl: Any, tmp_path: Path) -> None:
    corpora = jsonl("a", weight=1), jsonl("b", seed=1, weight=1)
    open_stream(*corpora).ledger_at(20).save(tmp_path / "ledger")
    with pytest.raises(DataError, match=r"data\.temperature decides the order"):
        open_stream(*corpora, temperature=2, ledger=Ledger.load(tmp_path / "ledger"))
    with pytest.raises(DataError, match="max_epochs in data.mixture decides the order"):
        open_stream(jsonl("a", weight=1, max_epochs=3), corpora[1], ledger=Ledger.load(tmp_path / "ledger"))
