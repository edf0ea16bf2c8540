"""Weights -> stages: temperature, limits of epochs, and parts of the run that begin later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from lmssl.data.ledger import Ledger
from lmssl.data.order import Order, Stage, exactly, integer_shares
from lmssl.errors import DataError
from lmssl.recipe.batches import BatchPlan, stage_starts
from lmssl.recipe.data import DataSection

STAGES = "data.stages"
"""Name of the setting in the ledger; the only one that may change while a run goes on, and only ahead of it."""

_ROUNDED = 1.01
"""By how much a corpus may exceed its limit of epochs where shares are rounded."""

_TEMPERED_DIGITS = 9
"""Powers are rounded to so many digits: the last bits of a power differ between machines, shares must not."""


def plan_stages(
    section: DataSection,
    weights: Sequence[float | int],
    *,
    seed: int,
    batches: BatchPlan | None = None,
    num_sequences: Callable[[str], int],
    begun: Sequence[Stage] = (),
) -> tuple[Stage, ...]:
    """The stages that a recipe asks for; each corpus continues where the stage before left it.

    A stage begins at the position that it has as if `data.skip` left out nothing. Where a corpus has `max_epochs`, a
    stage gives it at most what earlier stages left of them.

    Args:
        weights: of the corpora in the first stage.
        batches: the steps of the run; None: limits of epochs are not applied.
        num_sequences: sequences of an epoch of a corpus, possibly estimated; asked only for corpora with a limit.
        begun: stages that are kept as they are.

    Raises:
        DataError: the limits of epochs leave too little text for the run, or those of stages that are kept would be
            exceeded, because the run is longer than it was when they were planned.
    """
    names = tuple(corpus.name for corpus in section.mixture)
    limits = {corpus.name: corpus.max_epochs for corpus in section.mixture if corpus.max_epochs is not None}
    starts = [first for first, _ in section.starts]
    lengths = [None if length == section.sequence_length else length for _, length in section.starts]
    written = [list(weights)]
    for later in section.stages:
        written.append(written[-1] if later.weights is None else [later.weights.get(name, 0) for name in names])
    stages = list(begun)
    if begun and limits and batches is not None:
        end = starts[len(begun)] if len(begun) < len(starts) else batches.num_positions
        read = Order(begun, seed).counts_before(end)
        _refuse_more_epochs({name: (read[name], num_sequences(name), limit) for name, limit in limits.items()}, begun)
    for number in range(len(stages), len(starts)):
        first = starts[number]
        before = Order(stages, seed).counts_before(first) if stages else dict.fromkeys(names, 0)
        exact = tempered_weights(written[number], section.temperature)
        if limits and batches is not None:
            end = starts[number + 1] if number + 1 < len(starts) else batches.num_positions
            room = [
                exactly(limits[name]) * num_sequences(name) - before[name] if name in limits and weight else None
                for name, weight in zip(names, exact, strict=True)
            ]
            limited = limited_shares(exact, room, end - first)
            if limited is None:
                left = sum(max(count, Fraction(0)) for count in room if count is not None)
                raise _too_little_text(first + int(left), batches)
            exact = limited
        counts = tuple(before[name] for name in names)
        shares = integer_shares(exact)
        stages.append(Stage(first, names, shares, section.block_sequences, counts, lengths[number]))
    return tuple(stages)


def stages_setting(section: DataSection) -> list[Any]:
    """The stages as the ledger's settings hold them: tokens before, weights, and what else there is."""
    found: list[Any] = []
    for stage in section.stages:
        further = {"sequence_length": stage.sequence_length, "rope_theta": stage.rope_theta}
        further = {name: value for name, value in further.items() if value is not None}
        weights = None if stage.weights is None else dict(stage.weights)
        found.append([stage.from_tokens, weights, *([further] if further else [])])
    return found


def begun_stages(ledger: Ledger, section: DataSection, read_positions: int | None) -> tuple[Stage, ...]:
    """The stages of a ledger that a recipe may not change any more; all where it does not.

    Args:
        read_positions: where the run stands; None: every stage counts as begun.

    Raises:
        DataError: the recipe changes one of them.
    """
    then, now = ledger.settings.get(STAGES, []), stages_setting(section)
    if then == now:
        return ledger.stages

    def begun(stages: list[Any]) -> list[Any]:
        lengths = [(stage[0], stage[2].get("sequence_length") if len(stage) > 2 else None) for stage in stages]
        starts = stage_starts(section.sequence_length, lengths)[1:]
        found = zip(stages, starts, strict=True)
        return [stage for stage, (first, _) in found if read_positions is None or first < read_positions]

    kept = begun(then)
    if kept != begun(now):
        at = "the checkpoint" if read_positions is None else f"position {read_positions}"
        raise DataError(
            f"{STAGES} changed for a part of the run that lies before {at}",
            where=f"{STAGES}: {then} then, {now} now",
            remedy="restore the stages before it; those that begin there or later may change",
        )
    return ledger.stages[: 1 + len(kept)]


def tempered_weights(weights: Sequence[float | int], temperature: float | None) -> list[Fraction]:
    """The weights to the power 1/temperature: 1 keeps their proportion, a high one makes corpora equal.

    Source: Arivazhagan et al. 2019 (arXiv:1907.05019), section 3.1.
    """
    exact = [exactly(weight) for weight in weights]
    if temperature is None:
        return exact
    total = sum(exact)
    powers = [float(weight / total) ** (1 / temperature) for weight in exact]
    return [Fraction(f"{power / sum(powers):.{_TEMPERED_DIGITS}g}") for power in powers]


def limited_shares(
    weights: Sequence[Fraction], room: Sequence[Fraction | None], num_positions: int
) -> list[Fraction] | None:
    """Shares, their sum 1, near the weights and of which none takes more sequences than it has room.

    What a full corpus cannot take goes to the others in proportion to their weights, again and again until none is
    too full.

    Args:
        room: sequences that each may take at most; None: any number.

    Returns:
        None where all rooms together are too small.
    """
    full: dict[int, Fraction] = {}
    while True:
        left = 1 - sum(full.values())
        total = sum(weight for number, weight in enumerate(weights) if number not in full)
        if not total and left:
            return None
        shares = [
            full[number] if number in full else left * weight / total if weight else Fraction(0)
            for number, weight in enumerate(weights)
        ]
        over = {
            number: max(most, Fraction(0)) / num_positions
            for number, most in enumerate(room)
            if most is not None and number not in full and shares[number] * num_positions > most
        }
        if not over:
            return shares
        full |= over


def _refuse_more_epochs(read: Mapping[str, tuple[int, int, float]], begun: Sequence[Stage]) -> None:
    """Raise where a corpus would be read more often than its limit allows; shares are rounded, so by some sequences."""
    for name, (count, epoch, limit) in read.items():
        if count > limit * epoch * _ROUNDED + begun[-1].block_sequences:
            raise DataError(
                f"the run would read corpus {name!r} {count / epoch:.3g} times, more than max_epochs: {limit:g}: its "
                "share was chosen for a shorter run, or for another stage after it, and is kept",
                where="train.tokens, data.stages",
                remedy="restore both, or begin a new run with these weights: model.from",
            )


def _too_little_text(num_positions: int, batches: BatchPlan) -> DataError:
    step = batches.step_at(num_positions)
    possible = batches.tokens_before(step)
    lasting = possible + (num_positions - batches.first_position(step)) * batches.sequence_length(step)
    lower = f"lower train.tokens to at most {possible}, " if possible else ""
    return DataError(
        f"every corpus has a limit of epochs, and together they last for {lasting} tokens only",
        where="data.mixture, max_epochs",
        remedy=f"{lower}raise max_epochs, or add text",
    )
