"""Text for evaluation: the held-out split of each corpus, and further sets that are never trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lmssl.data.chunk import Chunk
from lmssl.data.epochs import Epochs
from lmssl.data.layout import Layout
from lmssl.data.order import Stage
from lmssl.data.window import Row, Window, WindowPlan
from lmssl.errors import DataError


@dataclass(frozen=True, eq=False)
class ValidationSplit:
    """Sequences of one corpus's held-out documents, or of a set's documents."""

    corpus: str
    window: Window

    @property
    def num_sequences(self) -> int:
        """Sequences."""
        return self.window.num_sequences

    @property
    def num_tokens(self) -> int:
        """Tokens, special tokens included, padding not."""
        return self.window.num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of text."""
        return self.window.num_bytes

    def sequence(self, index: int) -> Row:
        """The index-th sequence."""
        return self.window.gather(index)


def find_held_out(
    corpora: Sequence[Epochs],
    stages: Sequence[Stage],
    layout: Layout,
    *,
    budget_tokens: int,
    report: Callable[[str], None],
) -> tuple[ValidationSplit, ...]:
    """The held-out sequences of each corpus that has some, its part of the budget by its first share in a stage.

    Raises:
        DataError: no document at all is held out.
    """
    splits = []
    for epochs in corpora:
        found = _first_text(epochs, layout, _part(budget_tokens, epochs.corpus, stages))
        if found.num_sequences:
            splits.append(found)
        else:
            report(f"no document of corpus {epochs.corpus!r} is held out: evaluation does not cover it")
    if not splits:
        raise DataError(
            f"the validation split is empty: at ratio {layout.held_out_ratio} no document is held out",
            where="data.validation.ratio",
            remedy="raise the ratio, cut long documents with section_bytes, or set data.validation: null",
        )
    return tuple(splits)


def find_sets(corpora: Sequence[Epochs], layout: Layout, *, budget_tokens: int) -> tuple[ValidationSplit, ...]:
    """The first sequences of each further set, all of its documents taken alike.

    Raises:
        DataError: a set holds no text.
    """
    whole = replace(layout, held_out_ratio=1.0)
    splits = tuple(_first_text(epochs, whole, budget_tokens) for epochs in corpora)
    for split in splits:
        if not split.num_sequences:
            raise DataError(
                f"the validation set {split.corpus!r} holds no text",
                where="data.validation.sets",
                remedy="point it at text that is not empty, or leave it out",
            )
    return splits


def _part(budget_tokens: int, corpus: str, stages: Sequence[Stage]) -> int:
    # By the first stage that reads it, so that a stage added later changes no budget.
    shares = ((stage.shares[stage.corpora.index(corpus)], sum(stage.shares)) for stage in stages)
    share, total = next(((share, total) for share, total in shares if share), (0, 1))
    return max(1, -(-budget_tokens * share // total))


def set_chunks(corpora: Sequence[Epochs], layout: Layout, *, budget_tokens: int) -> Iterator[Chunk]:
    """The chunks that `find_sets` reads, built as they are asked for."""
    whole = replace(layout, held_out_ratio=1.0)
    return (chunk for epochs in corpora for chunk, _ in _first_chunks(epochs, whole, budget_tokens))


def _first_text(epochs: Epochs, layout: Layout, budget_tokens: int) -> ValidationSplit:
    """Text up to a budget."""
    paths = tuple(chunk.path for chunk, num_tokens in _first_chunks(epochs, layout, budget_tokens) if num_tokens)
    return ValidationSplit(epochs.corpus, Window(WindowPlan(epochs.corpus, 0, 0, paths, budget_tokens), layout))


def _first_chunks(epochs: Epochs, layout: Layout, budget_tokens: int) -> Iterator[tuple[Chunk, int]]:
    """Chunks up to a budget, in an order of their own, each with its held-out tokens."""
    num_tokens = 0
    for chunk in epochs.chunks("validation"):
        found = Window(WindowPlan(epochs.corpus, 0, 0, (chunk.path,), budget_tokens), layout).num_document_tokens
        yield chunk, found
        num_tokens += found
        if num_tokens >= budget_tokens:
            return
