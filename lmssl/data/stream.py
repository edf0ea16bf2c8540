"""Position -> sequence, and the text for evaluation."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from lmssl.data.cache import ChunkCache
from lmssl.data.corpus import Unit, check_first_record, list_units, mixture_weights, source_notes
from lmssl.data.epochs import Epochs
from lmssl.data.layout import Layout
from lmssl.data.ledger import Ledger
from lmssl.data.marks import mark_files
from lmssl.data.order import Order
from lmssl.data.overlaps import EvaluationText, read_evaluation_text
from lmssl.data.records import BadRecord
from lmssl.data.remote import RemoteFiles
from lmssl.data.settings import continued, order_settings
from lmssl.data.stages import plan_stages
from lmssl.data.token_files import without_text
from lmssl.data.validation import ValidationSplit, find_held_out, find_sets
from lmssl.data.window import Address, OpenWindows, Row, Rows, Window, WindowPlan, gather_rows
from lmssl.errors import DataError
from lmssl.recipe.batches import BatchPlan
from lmssl.recipe.data import AnyCorpus, DataSection, TokensCorpus
from lmssl.tokenizer.load import Tokenizer

_OPEN_WINDOWS = 8
_OPEN_TABLE_BYTES = 128 << 20
"""What positions in any order may keep open: windows of about a million documents."""


@dataclass(frozen=True)
class Totals:
    """Counts over some windows."""

    num_sequences: int
    num_documents: int
    num_tokens: int
    """Special tokens included, padding not."""
    num_bytes: int
    """Bytes of text."""
    num_padding: int
    num_cut_documents: int
    num_bad_records: int
    num_dropped_short: int = 0
    """Training documents that filters left out, in every epoch anew; by reason."""
    num_dropped_long: int = 0
    num_dropped_duplicates: int = 0
    num_dropped_overlaps: int = 0

    @property
    def padding_ratio(self) -> float:
        """Padding / all tokens."""
        return self.num_padding / max(1, self.num_padding + self.num_tokens)


class SequenceStream:
    """The global order of sequences: any position, in any order, from the recipe and a seed alone."""

    def __init__(
        self,
        section: DataSection,
        layout: Layout,
        order: Order,
        epochs: Sequence[Epochs],
        ledger: Ledger,
        report: Callable[[str], None],
        cancel: threading.Event,
        sets: Sequence[Epochs] = (),
    ) -> None:
        self.section = section
        self.layout = layout
        self.order = order
        self.ledger = ledger
        self.report = report
        self.cancel = cancel
        """While set, building in any thread stops early with `Cancelled`."""
        self._epochs = {epoch.corpus: epoch for epoch in epochs}
        self._windows = OpenWindows(layout, _OPEN_WINDOWS, _OPEN_TABLE_BYTES)
        self._sets = tuple(sets)
        self._validation: tuple[ValidationSplit, ...] | None = None
        self._found_sets: tuple[ValidationSplit, ...] | None = None

    @classmethod
    def open(
        cls,
        section: DataSection,
        tokenizer: Tokenizer,
        seed: int,
        cache_dir: Path,
        ledger: Ledger | None = None,
        report: Callable[[str], None] | None = None,
        *,
        batches: BatchPlan | None = None,
        read_positions: int | None = None,
        seps_per_segment: int = 1,
    ) -> SequenceStream:
        """List the corpora, look at their first records, and tokenize nothing but for `max_epochs` a first chunk.

        Args:
            ledger: continues the order of a checkpoint.
            report: receives one line per event worth knowing.
            batches: the steps of the run; None: `max_epochs` is not applied.
            read_positions: the ledger's run has read none from there on; stages that begin there may differ.
            seps_per_segment: sep tokens that the objective wants in each segment, where `data.sep` is on.

        Raises:
            DataError: a corpus or evaluation text cannot be read, the cache cannot be written, a token is missing, the
                limits of epochs leave too little text, or a setting that decides the order is not the ledger's.
        """
        say = report if report is not None else _silent
        evaluation = evaluation_text(section, say)
        column = None if evaluation is None else evaluation.column
        layout = Layout.of(section, tokenizer, seed, column, seps_per_segment)
        cancel, folder = threading.Event(), Path(os.path.expanduser(cache_dir))
        remote = RemoteFiles(folder / "remote", section.remote_cache_bytes, cancelled=cancel.is_set)
        units = _list_units(section.mixture, section, remote)
        for line in chain.from_iterable(map(source_notes, units)):
            say(line)
        settings = order_settings(section, layout, tokenizer, units)
        begun = () if ledger is None else continued(ledger, settings, units, section, read_positions)
        ledger = ledger or Ledger((), settings, mark_files(units))
        ledger.settings = settings
        cache = ChunkCache(
            folder,
            tokenizer,
            max_bad_records=section.max_bad_records,
            report=say,
            cancelled=cancel.is_set,
            evaluation=evaluation,
        )
        limits = {"window_chunks": section.window_chunks, "max_bad_records": section.max_bad_records}
        epochs = {listed[0].corpus: Epochs(listed, cache, layout, ledger, **limits) for listed in units}
        ledger.stages = plan_stages(
            section,
            mixture_weights(section.mixture, units),
            seed=seed,
            batches=batches,
            num_sequences=lambda corpus: epochs[corpus].estimate_sequences(),
            begun=begun,
        )
        sets = open_sets(list_sets(section, remote), section, layout, cache)
        return cls(section, layout, Order(ledger.stages, seed), [*epochs.values()], ledger, say, cancel, sets)

    def address(self, position: int) -> Address:
        """Where the sequence at a position is; windows before it are built if they are not known yet."""
        return self.locate(position)[0]

    def locate(self, position: int) -> tuple[Address, WindowPlan]:
        """Where the sequence at a position is, and what its window is made of."""
        corpus, k = self.order.locate(position)
        epochs = self._epochs[corpus]
        number, index = epochs.find(k)
        plan = epochs.plan(number)
        return Address(corpus, plan.epoch, plan.window, index), plan

    def sequence(self, position: int) -> Row:
        """The sequence at a position."""
        address, plan = self.locate(position)
        return self._windows.get(plan).gather(address.index)

    def sequences(self, positions: Sequence[int]) -> Rows:
        """The sequences at some positions of one length, in their order; faster than one by one."""
        windows: dict[tuple[str, int], Window] = {}
        found = []
        for corpus, k in map(self.order.locate, positions):
            epochs = self._epochs[corpus]
            number, index = epochs.find(k)
            window = windows.get((corpus, number))
            if window is None:
                window = windows[corpus, number] = self._windows.get(epochs.plan(number))
            found.append((window, index))
        return gather_rows(found, self.layout_at(positions[0]) if positions else self.layout)

    def layout_at(self, position: int) -> Layout:
        """How documents become sequences in the stage that holds a position."""
        length = self.order.sequence_length(position)
        return self.layout if length is None else replace(self.layout, sequence_length=length)

    def window_at(self, position: int) -> tuple[Window, int]:
        """The window that holds the sequence at a position, and the index in it."""
        address, plan = self.locate(position)
        return self._windows.get(plan), address.index

    def units(self, corpus: str) -> tuple[Unit, ...]:
        """What a corpus or a validation set is read from."""
        return {found.corpus: found.units for found in (*self._epochs.values(), *self._sets)}[corpus]

    def first_epoch(self, corpus: str) -> Iterator[tuple[range, Window]]:
        """The windows of a corpus's first epoch, built as they are asked for, and which of its sequences they hold.

        The first sequences of a window are held; what lies beyond is repacked in the next one.
        """
        epochs, number, ended = self._epochs[corpus], 0, False
        while not ended:
            entry = epochs.ensure(number)
            yield self.ledger.read(corpus, number), self._windows.get(epochs.plan(number))
            number, ended = number + 1, entry.ends_epoch and not self.ledger.is_cut(corpus, number)

    def build_ahead(self, position: int) -> None:
        """Build what follows a position: of each corpus the window in use and the next one.

        Raises:
            Cancelled: `cancel` was set meanwhile.
        """
        in_use = self.order.in_use(position)
        for corpus, k in self.order.counts_before(position).items():
            if corpus not in in_use:
                continue
            number, _ = self._epochs[corpus].find(k)
            self._epochs[corpus].ensure(number + 1)

    def require_batch(self, batch_sequences: int) -> None:
        """Make sure that there is text for one batch.

        Raises:
            DataError: one epoch of all corpora holds fewer sequences.
        """
        found = 0
        stage = self.order.stages[0]
        for corpus, share in zip(stage.corpora, stage.shares, strict=True):
            if not share:
                continue
            epochs = self._epochs[corpus]
            number, ended = 0, False
            while not ended and found < batch_sequences:
                entry = epochs.ensure(number)
                found, number, ended = found + entry.num_sequences, number + 1, entry.ends_epoch
        if found < batch_sequences:
            length = self.layout.sequence_length
            raise DataError(
                f"the corpora hold {found} sequences of {length} tokens in all, and a batch takes {batch_sequences}",
                where="data.mixture",
                remedy=f"add text, or lower train.batch_tokens to at most {found * length}",
            )

    def num_sequences_per_epoch(self) -> dict[str, int]:
        """Sequences of each corpus in its first epoch; builds all of it."""
        found = {}
        for corpus, epochs in self._epochs.items():
            number = 0
            while not epochs.ensure(number).ends_epoch or self.ledger.is_cut(corpus, number):
                number += 1
            found[corpus] = self.ledger.read(corpus, number).stop
        return found

    def ledger_at(self, position: int) -> Ledger:
        """The part of the ledger that the first `position` positions need, however far ahead windows are built."""
        counts = self.order.counts_before(position)
        for corpus, count in counts.items():
            if count:  # other processes may have read what this one has not looked up
                self._epochs[corpus].find(count - 1)
        return self.ledger.up_to(counts)

    def epochs_at(self, position: int) -> dict[str, float]:
        """Epochs of each corpus that the first `position` positions are, skipped ones included."""
        return {corpus: self._epochs[corpus].passed(k) for corpus, k in self.order.counts_before(position).items()}

    def totals(self, position: int | None = None) -> Totals:
        """Counts over the windows that the first `position` positions touch; None: over all known windows."""
        ledger = self.ledger if position is None else self.ledger_at(position)
        entries = [entry for corpus in self._epochs for entry in ledger.entries(corpus)]
        return Totals(
            num_sequences=sum(entry.num_sequences for entry in entries),
            num_documents=sum(entry.num_documents for entry in entries),
            num_tokens=sum(entry.num_tokens for entry in entries),
            num_bytes=sum(entry.num_bytes for entry in entries),
            num_padding=sum(entry.num_padding for entry in entries),
            num_cut_documents=sum(entry.num_cut_documents for entry in entries),
            num_bad_records=sum(entry.num_bad for entry in entries if entry.epoch == 0),
            num_dropped_short=sum(entry.num_dropped_short for entry in entries),
            num_dropped_long=sum(entry.num_dropped_long for entry in entries),
            num_dropped_duplicates=sum(entry.num_dropped_duplicates for entry in entries),
            num_dropped_overlaps=sum(entry.num_dropped_overlaps for entry in entries),
        )

    def plan(self, corpus: str, number: int) -> WindowPlan:
        """What a window of the ledger is made of."""
        return self._epochs[corpus].plan(number)

    def bad_records(self, corpus: str, number: int) -> list[tuple[str, BadRecord]]:
        """The unreadable records of a window of the ledger, each with its file."""
        return self._epochs[corpus].bad_records(number)

    def validation(self) -> tuple[ValidationSplit, ...]:
        """The held-out sequences of each corpus that has some; empty where the recipe wants none.

        `validation.tokens` is divided by weight. Chunks are read in an order of their own, until each corpus's share
        is found.

        Raises:
            DataError: no document at all is held out.
        """
        if self.section.validation is None:
            return ()
        if self._validation is None:
            self._validation = find_held_out(
                list(self._epochs.values()),
                self.order.stages,
                self.layout,
                budget_tokens=self.section.validation.tokens,
                report=self.report,
            )
        return self._validation

    def validation_sets(self) -> tuple[ValidationSplit, ...]:
        """The sequences of each of `validation.sets`, up to `validation.tokens` of each.

        Raises:
            DataError: a set holds no text.
        """
        if self.section.validation is None:
            return ()
        if self._found_sets is None:
            self._found_sets = find_sets(self._sets, self.layout, budget_tokens=self.section.validation.tokens)
        return self._found_sets


def list_sets(section: DataSection, remote: RemoteFiles) -> list[tuple[Unit, ...]]:
    """The units of each of `validation.sets`, whose first records are looked at.

    Raises:
        DataError: see `list_units` and `check_first_record`.
    """
    return _list_units(section.validation.sets if section.validation is not None else (), section, remote)


def open_sets(
    listed: Sequence[Sequence[Unit]], section: DataSection, layout: Layout, cache: ChunkCache
) -> list[Epochs]:
    """Each of `validation.sets`, from its units."""
    limits = {"window_chunks": section.window_chunks, "max_bad_records": section.max_bad_records}
    return [Epochs(units, cache, layout, Ledger((), {}), **limits) for units in listed]


def _list_units(corpora: Sequence[AnyCorpus], section: DataSection, remote: RemoteFiles) -> list[tuple[Unit, ...]]:
    units = [list_units(corpus, chunk_bytes=section.chunk_bytes, remote=remote) for corpus in corpora]
    for listed in units:
        check_first_record(listed)
    return units


def _silent(line: str) -> None:
    del line


def evaluation_text(section: DataSection, report: Callable[[str], None]) -> EvaluationText | None:
    """The text that training documents must not overlap with; None: the recipe names none.

    Raises:
        DataError: it cannot be read, or a corpus has no text to compare.
    """
    if section.filters.decontaminate is None:
        return None
    for corpus in section.mixture:
        if isinstance(corpus, TokensCorpus):
            raise without_text(corpus.name)
    return read_evaluation_text(section.filters.decontaminate, report)
