"""Position -> sequence, and the validation split."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmssl.data.cache import ChunkCache
from lmssl.data.corpus import Unit, check_first_record, list_units, mixture_weights
from lmssl.data.epochs import Epochs
from lmssl.data.ledger import Ledger
from lmssl.data.order import Order, Stage, integer_shares
from lmssl.data.window import Address, Layout, OpenWindows, Row, Window, WindowPlan
from lmssl.errors import DataError
from lmssl.recipe.data import DataSection
from lmssl.tokenizer.load import Tokenizer

_OPEN_WINDOWS = 8


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

    @property
    def padding_ratio(self) -> float:
        """Padding / all tokens."""
        return self.num_padding / max(1, self.num_padding + self.num_tokens)


@dataclass(frozen=True, eq=False)
class ValidationSplit:
    """Sequences of one corpus's held-out documents."""

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
    ) -> None:
        self.section = section
        self.layout = layout
        self.order = order
        self.ledger = ledger
        self.report = report
        self.cancel = cancel
        """While set, building in any thread stops early with `Cancelled`."""
        self._epochs = {epoch.corpus: epoch for epoch in epochs}
        self._windows = OpenWindows(layout, _OPEN_WINDOWS)
        self._validation: tuple[ValidationSplit, ...] | None = None

    @classmethod
    def open(
        cls,
        section: DataSection,
        tokenizer: Tokenizer,
        seed: int,
        cache_dir: Path,
        ledger: Ledger | None = None,
        report: Callable[[str], None] | None = None,
    ) -> SequenceStream:
        """List the corpora and look at their first records; no text is tokenized yet.

        `ledger` continues the order of a checkpoint; `report` receives one line per event worth knowing.

        Raises:
            DataError: a corpus cannot be listed, the cache cannot be written, a special token is missing, or a
                setting that decides the order is not what it was when the ledger was written.
        """
        say = report if report is not None else _silent
        layout = Layout.of(section, tokenizer, seed)
        units = [list_units(corpus, chunk_bytes=section.chunk_bytes) for corpus in section.mixture]
        for listed in units:
            check_first_record(listed)
        settings = _settings(section, layout, tokenizer, units)
        if ledger is None:
            shares = integer_shares(mixture_weights(section.mixture, units))
            names = tuple(corpus.name for corpus in section.mixture)
            ledger = Ledger([Stage(0, names, shares, section.block_sequences, (0,) * len(names))], settings)
        else:
            _refuse_changes(ledger.settings, settings)
        cancel = threading.Event()
        cache = ChunkCache(
            Path(os.path.expanduser(cache_dir)),
            tokenizer,
            max_bad_records=section.max_bad_records,
            report=say,
            cancelled=cancel.is_set,
        )
        epochs = [
            Epochs(
                listed,
                cache,
                layout,
                ledger,
                window_chunks=section.window_chunks,
                max_bad_records=section.max_bad_records,
            )
            for listed in units
        ]
        return cls(section, layout, Order(ledger.stages, seed), epochs, ledger, say, cancel)

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

    def build_ahead(self, position: int) -> None:
        """Build what follows a position: of each corpus the window in use and the next one.

        Raises:
            Cancelled: `cancel` was set meanwhile.
        """
        for corpus, k in self.order.counts_before(position).items():
            number, _ = self._epochs[corpus].find(k)
            self._epochs[corpus].ensure(number + 1)

    def require_batch(self, batch_sequences: int) -> None:
        """Make sure that there is text for one batch.

        Raises:
            DataError: one epoch of all corpora holds fewer sequences.
        """
        found = 0
        for epochs in self._epochs.values():
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
            while not epochs.ensure(number).ends_epoch:
                number += 1
            found[corpus] = sum(entry.num_sequences for entry in self.ledger.entries(corpus)[: number + 1])
        return found

    def ledger_at(self, position: int) -> Ledger:
        """The part of the ledger that the first `position` positions need, however far ahead windows are built."""
        return self.ledger.up_to(self.order.counts_before(position))

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
        )

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
            self._validation = self._find_validation(self.section.validation.tokens)
        return self._validation

    def _find_validation(self, budget_tokens: int) -> tuple[ValidationSplit, ...]:
        stage = self.order.stages[0]
        splits = []
        for corpus, share in zip(stage.corpora, stage.shares, strict=True):
            budget = max(1, -(-budget_tokens * share // sum(stage.shares)))
            found = ValidationSplit(corpus, self._held_out(corpus, budget))
            if found.num_sequences:
                splits.append(found)
            else:
                self.report(f"no document of corpus {corpus!r} is held out: evaluation does not cover it")
        if not splits:
            raise DataError(
                f"the validation split is empty: at ratio {self.layout.held_out_ratio} no document is held out",
                where="data.validation.ratio",
                remedy="raise the ratio, cut long documents with section_bytes, or set data.validation: null",
            )
        return tuple(splits)

    def _held_out(self, corpus: str, budget_tokens: int) -> Window:
        paths: list[Path] = []
        num_tokens = 0
        for chunk in self._epochs[corpus].chunks("validation"):
            found = Window(WindowPlan(corpus, 0, 0, (chunk.path,), budget_tokens), self.layout).num_tokens
            if found:
                paths.append(chunk.path)
                num_tokens += found
            if num_tokens >= budget_tokens:
                break
        return Window(WindowPlan(corpus, 0, 0, tuple(paths), budget_tokens), self.layout)


def _silent(line: str) -> None:
    del line


def _settings(
    section: DataSection, layout: Layout, tokenizer: Tokenizer, units: Sequence[Sequence[Unit]]
) -> dict[str, Any]:
    """What the order depends on, by the name a user knows it under."""
    settings: dict[str, Any] = {
        "data.sequence_length": section.sequence_length,
        "data.packing": section.packing,
        "data.bos": section.bos,
        "data.eos": section.eos,
        "data.seed": layout.seed,
        "data.validation.ratio": layout.held_out_ratio,
        "data.window_chunks": section.window_chunks,
        "data.chunk_bytes": section.chunk_bytes,
        "data.block_sequences": section.block_sequences,
        "data.mixture": [[corpus.name, corpus.weight] for corpus in section.mixture],
        "the tokenizer": tokenizer.fingerprint,
    }
    for listed in units:
        sources = [[os.path.basename(part.path), part.start, part.stop] for unit in listed for part in unit.parts]
        num_bytes = sum(unit.num_bytes for unit in listed)
        digest = hashlib.blake2b(json.dumps([sources, asdict(listed[0].form)]).encode(), digest_size=4).hexdigest()
        settings[f"the files of corpus {listed[0].corpus!r}"] = f"{len(sources)} parts, {num_bytes} bytes, {digest}"
    return settings


def _refuse_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            raise DataError(
                f"{name} decides the order of the data, and changed since the checkpoint",
                where=f"{name}: {then.get(name)} then, {now.get(name)} now",
                remedy="restore it, or start a new run in another folder",
            )
