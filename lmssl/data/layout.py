"""How documents become sequences: what a recipe and a tokenizer say about it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmssl.data.fill_in_the_middle import FillInTheMiddle
from lmssl.data.filters import Filters
from lmssl.errors import DataError
from lmssl.recipe.data import DataSection
from lmssl.tokenizer.load import Tokenizer


@dataclass(frozen=True)
class Layout:
    """How documents become sequences."""

    sequence_length: int
    packing: str
    bos_id: int | None
    """Put before each document; None: nothing is."""
    eos_id: int | None
    """Put after each document; None: nothing is."""
    pad_id: int
    """Fills what no segment does; never a target."""
    seed: int
    held_out_ratio: float
    align_starts: bool = False
    """Inside a sequence, segments that start a document stand before those that do not."""
    filters: Filters = field(default_factory=Filters)
    fill_in_the_middle: FillInTheMiddle | None = None
    cls_id: int | None = None
    """Put before each segment, a cut document's too; None: nothing is."""
    sep_id: int | None = None
    """Put after each segment; None: nothing is."""
    seps_per_segment: int = 1
    """How many; an objective that asks for 2 moves one of them between the sentences of a pair."""

    @property
    def overhead_tokens(self) -> int:
        """Special tokens around each segment; bos and eos, around documents, count as tokens of these."""
        return (self.cls_id is not None) + self.seps_per_segment * (self.sep_id is not None)

    @classmethod
    def of(
        cls,
        section: DataSection,
        tokenizer: Tokenizer,
        seed: int,
        overlap_column: str | None = None,
        seps_per_segment: int = 1,
    ) -> Layout:
        """The layout a recipe asks for; `overlap_column` is what a cache calls its column of overlaps.

        Raises:
            DataError: it asks for a special token that the tokenizer lacks.
        """
        transform = section.fill_in_the_middle
        for role in ("bos", "eos", "cls", "sep"):
            if getattr(section, role) and getattr(tokenizer, f"{role}_id") is None:
                raise DataError(
                    f"data.{role} is on, and the tokenizer has no {role} token",
                    where=str(tokenizer.path),
                    remedy=f"set data.{role}: false, or use a tokenizer whose config names a {role}_token",
                )
        fillers = (tokenizer.pad_id, tokenizer.eos_id, 0)
        return cls(
            sequence_length=section.sequence_length,
            packing=section.packing,
            bos_id=tokenizer.bos_id if section.bos else None,
            eos_id=tokenizer.eos_id if section.eos else None,
            pad_id=next(token for token in fillers if token is not None),
            seed=seed,
            held_out_ratio=section.validation.ratio if section.validation else 0.0,
            align_starts=section.align_starts,
            filters=Filters.of(section.filters, overlap_column),
            fill_in_the_middle=FillInTheMiddle.of(transform, tokenizer) if transform else None,
            cls_id=tokenizer.cls_id if section.cls else None,
            sep_id=tokenizer.sep_id if section.sep else None,
            seps_per_segment=seps_per_segment,
        )
