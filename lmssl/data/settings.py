"""What decides the order of the data, as the ledger holds it, and what of it may change when a run continues."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lmssl.data.corpus import Unit
from lmssl.data.layout import Layout
from lmssl.data.ledger import Ledger
from lmssl.data.marks import refuse_other_files
from lmssl.data.order import Stage
from lmssl.data.stages import STAGES, begun_stages, stages_setting
from lmssl.errors import DataError
from lmssl.recipe.data import DataSection
from lmssl.tokenizer.load import Tokenizer


def order_settings(
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
    # Options that are off are left out: runs that began before there were any continue.
    if section.align_starts:
        settings["data.align_starts"] = True
    if section.fill_in_the_middle is not None:
        settings["data.fill_in_the_middle"] = section.fill_in_the_middle.model_dump()
    settings |= {f"data.{role}": True for role in ("cls", "sep") if getattr(section, role)}
    if layout.seps_per_segment != 1:
        settings["how many sep tokens the objective puts into a segment"] = layout.seps_per_segment
    filters = {"min_tokens": section.filters.min_tokens, "max_tokens": section.filters.max_tokens}
    filters["drop_duplicates"] = section.filters.drop_duplicates or None
    settings |= {f"data.filters.{name}": value for name, value in filters.items() if value is not None}
    if layout.filters.overlap_column is not None:
        settings["the text of data.filters.decontaminate"] = layout.filters.overlap_column
    # Entered only where they are used, so that older ledgers stay valid.
    if section.temperature is not None:
        settings["data.temperature"] = section.temperature
    if section.stages:
        settings[STAGES] = stages_setting(section)
    if any(corpus.max_epochs is not None for corpus in section.mixture):
        settings["max_epochs in data.mixture"] = [[corpus.name, corpus.max_epochs] for corpus in section.mixture]
    for listed in units:
        sources = [[os.path.basename(part.path), part.start, part.stop] for unit in listed for part in unit.parts]
        num_bytes = sum(unit.num_bytes for unit in listed)
        digest = hashlib.blake2b(json.dumps([sources, asdict(listed[0].form)]).encode(), digest_size=4).hexdigest()
        settings[f"the files of corpus {listed[0].corpus!r}"] = f"{len(sources)} parts, {num_bytes} bytes, {digest}"
    return settings


def continued(
    ledger: Ledger,
    settings: Mapping[str, Any],
    units: Sequence[Sequence[Unit]],
    section: DataSection,
    read_positions: int | None,
) -> tuple[Stage, ...]:
    """The stages of a ledger that go on as they are.

    Raises:
        DataError: a file or setting is not the ledger's, or a stage that the run has read of.
    """
    refuse_other_files(ledger.files, units)
    _refuse_changes(ledger.settings, settings)
    return begun_stages(ledger, section, read_positions)


def _refuse_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in sorted({*then, *now}):
        if name != STAGES and then.get(name) != now.get(name):
            raise DataError(
                f"{name} decides the order of the data, and changed since the checkpoint",
                where=f"{name}: {then.get(name)} then, {now.get(name)} now",
                remedy="restore it, or start a new run in another folder",
            )
