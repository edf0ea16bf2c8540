"""Steps to positions and tokens and back: against a plan that is counted out step by step."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmssl.errors import RecipeError
from lmssl.recipe.batches import BatchPlan, Ramp, kept_before, plan_batches
from lmssl.recipe.load import Loaded
from lmssl.recipe.sections import derived_fields

Lengths = tuple[tuple[int, int], ...]


def counted(tokens: int, ramp: Ramp, lengths: Lengths, beyond: int = 3) -> list[tuple[int, int, int, int]]:
    """First position, tokens before, sequences and their length of each step, and of some beyond the last."""
    rows: list[tuple[int, int, int, int]] = []
    position = before = 0
    while beyond:
        number = max(n for n, (first, _) in enumerate(lengths) if first <= position)
        length = lengths[number][1]
        end = next((first for first, other in lengths[number + 1 :] if other != length), float("inf"))
        line = ramp.first + (ramp.last - ramp.first) * min(1.0, before / ramp.length if ramp.length else 1.0)
        assert abs(ramp.size(before) - line) <= ramp.jump / 2 + 1e-6
        count = int(min(ramp.size(before) // length, end - position))
        rows.append((position, before, count, length))
        position, before = position + count, before + count * length
        beyond -= before >= tokens
    return rows


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, Ramp, Lengths]:
    longest = draw(st.sampled_from([8, 16, 24]))
    first, last = sorted(longest * draw(st.integers(1, 40)) for _ in range(2))
    ramp = Ramp(first, last, draw(st.sampled_from([0, 1, 100, 3000])))
    divisors = [length for length in (4, 8, 12, 16, 24) if gcd(first, last) % length == 0]
    starts = sorted({0, *draw(st.lists(st.integers(1, 300), max_size=3))})
    lengths = tuple((start, draw(st.sampled_from(divisors))) for start in starts)
    return draw(st.integers(1, 6000)), ramp, lengths


@settings(max_examples=150, deadline=None)
@given(plans())
def test_every_answer_is_that_of_counting(given_plan: tuple[int, Ramp, Lengths]) -> None:
    tokens, ramp, lengths = given_plan
    plan, rows = plan_batches(tokens, ramp, lengths), counted(tokens, ramp, lengths)
    assert plan.num_steps == next(n for n, row in enumerate(rows) if row[1] >= tokens)
    for step, (position, before, count, length) in enumerate(rows):
        assert plan.first_position(step) == position
        assert plan.tokens_before(step) == before
        assert plan.num_sequences(step) == count
        assert plan.sequence_length(step) == length
        assert plan.num_tokens(step) == count * length
        assert {plan.step_at(k) for k in range(position, position + count)} == {step}
        assert {plan.step_at_token(k) for k in (before, before + count * length - 1)} == {step}
    assert plan.total_tokens == plan.tokens_before(plan.num_steps) >= tokens
    assert plan.num_positions == plan.first_position(plan.num_steps)
    by_length = {length: 0 for _, length in lengths}
    for _, _, count, length in rows[: plan.num_steps]:
        by_length[length] += count * length
    assert plan.tokens_by_length() == {length: number for length, number in by_length.items() if number}


def test_without_warmup_it_is_one_multiplication() -> None:
    plan = plan_batches(10_000, Ramp(640, 640, 0), ((0, 64),))
    assert len(plan.spans) == 1
    assert plan.num_steps == 16  # rounded up
    assert [plan.first_position(step) for step in (0, 1, 15)] == [0, 10, 150]
    assert plan.total_tokens == 10_240


def test_micro_batches_that_divide_both_ends_are_full() -> None:
    """Ettin: 72 to 4,608 sequences of 1,024 tokens over 50 billion."""
    plan = plan_batches(1_700_000_000_000, Ramp(72 * 1024, 4608 * 1024, 50_000_000_000), ((0, 1024),))
    sizes = [span.num_sequences for span in plan.spans]
    assert sizes == list(range(72, 4609, 72))
    growing = plan.spans[-1]
    assert growing.first_tokens == pytest.approx(50e9, rel=0.02)
    assert growing.first_step == pytest.approx(50e9 / (4608 - 72) / 1024 * 4.16, rel=0.02)  # ln(4608 / 72) = 4.16
    assert plan.step_at_token(10**12) == plan.step_at(plan.first_position(plan.step_at_token(10**12)))


def test_a_step_ends_where_another_length_begins() -> None:
    plan = plan_batches(1280, Ramp(64, 64, 0), ((0, 16), (10, 32)))
    assert [(plan.num_sequences(step), plan.sequence_length(step)) for step in range(4)] == [
        (4, 16),
        (4, 16),
        (2, 16),
        (2, 32),
    ]


def test_a_stage_of_the_same_length_ends_no_step() -> None:
    plan = plan_batches(1280, Ramp(64, 64, 0), ((0, 16), (10, 16)))
    assert plan.spans == BatchPlan.even(4, sequence_length=16).spans


def test_kept_before_is_the_inverse_of_the_kept_position() -> None:
    from lmssl.data.order import kept_position

    skip = [(3, 5), (5, 6), (9, 20)]
    assert [kept_before(kept_position(k, skip), skip) for k in range(40)] == list(range(40))


GPT2 = ("model={kind: gpt2, n_embd: 64, n_layer: 1, n_head: 4}",)
WARMUP = ("train.batch_warmup.from_tokens=256", "train.batch_warmup.tokens=10_000", "data.block_sequences=16")


def stage(from_tokens: int) -> str:
    return f"data.stages=[{{from_tokens: {from_tokens}, weights: {{a: 1}}}}]"


def lengths(*written: str) -> str:
    return f"data.stages=[{', '.join(f'{{{text}}}' for text in written)}]"


def test_a_recipe_with_lengths(load: Callable[..., Loaded]) -> None:
    longer = lengths("from_tokens: 10240, sequence_length: 256", "from_tokens: 20480, rope_theta: 5e4")
    recipe = load(longer, "model.rope_theta=1e4").recipe
    assert recipe.data.starts == ((0, 64), (160, 256), (200, 256))
    assert recipe.data.longest_sequence == 256
    assert derived_fields(recipe)["model.max_position_embeddings"] == 256
    plan = recipe.batches
    assert [plan.num_sequences(step) for step in (0, 9, 10, 97)] == [16, 16, 4, 4]
    assert [recipe.rope_theta(step) for step in (0, 19, 20, 97)] == [1e4, 1e4, 5e4, 5e4]
    assert load().recipe.rope_theta(3) is None
    # Left out positions move the change into a step, which ends there.
    skipped = load(longer, "data.skip=[[3, 5]]").recipe
    assert [skipped.batches.num_sequences(step) for step in (8, 9, 10)] == [16, 14, 4]
    assert skipped.rope_theta(20) == 5e4


def test_a_recipe_without_warmup_has_equal_steps(load: Callable[..., Loaded]) -> None:
    plan = load().recipe.batches
    assert plan.spans == BatchPlan.even(16, sequence_length=64).spans
    assert plan.num_steps == 98


def test_a_stage_begins_with_a_step_under_warmup_too(load: Callable[..., Loaded]) -> None:
    plan = load(*WARMUP).recipe.batches
    assert [plan.num_sequences(step) for step in (0, plan.num_steps - 1)] == [4, 16]
    inside = plan.tokens_before(7)
    assert plan.num_tokens(7) not in (256, 1024)
    assert load(*WARMUP, stage(inside)).recipe.batches.step_at(inside // 64) == 7


@pytest.mark.parametrize(
    ("overrides", "path", "what"),
    [
        ((*WARMUP, stage(300)), "data.stages.0.from_tokens", "no step begins at 300 under train.batch_warmup"),
        ((*WARMUP, stage(100)), "data.stages.0.from_tokens", "use 256"),
        ((*WARMUP, stage(300)), "data.stages.0.from_tokens", "use 256 or 512"),
        ((*WARMUP, "train.batch_warmup.from_tokens=100"), "train.batch_warmup.from_tokens", "use 128"),
        ((*WARMUP, "train.batch_warmup.from_tokens=2048"), "train.batch_warmup.from_tokens", "more than train.batch_"),
        ((*WARMUP, "train.batch_warmup.tokens=1e6"), "train.batch_warmup.tokens", "more than train.tokens=100000"),
        ((lengths("from_tokens: 2048, sequence_length: 96"),), "data.stages.0.sequence_length", "96 does not divide"),
        (
            (*WARMUP, lengths("from_tokens: 256, sequence_length: 512")),
            *("data.stages.0.sequence_length", "does not divide train.batch_warmup.from_tokens=256"),
        ),
        ((lengths("from_tokens: 2048"),), "data.stages.0", "nothing changes here"),
        ((lengths("from_tokens: 2048, sequence_length: 4"),), "data.stages.0.sequence_length", "8"),
        (
            ("data.mixture.0.max_epochs=2", lengths("from_tokens: 2048, sequence_length: 128")),
            *("data.mixture", "a has max_epochs"),
        ),
        (
            ("model.max_position_embeddings=64", lengths("from_tokens: 2048, sequence_length: 128")),
            *("model.max_position_embeddings", "less than the longest sequence_length=128"),
        ),
        (
            (*GPT2, lengths("from_tokens: 2048, rope_theta: 1e5")),
            *("data.stages.0.rope_theta", "of the kind gpt2 none is known"),
        ),
    ],
)
def test_what_cannot_be_is_refused(
    refusal: Callable[..., RecipeError], overrides: tuple[str, ...], path: str, what: str
) -> None:
    text = str(refusal(*overrides))
    assert path in text and what in text
