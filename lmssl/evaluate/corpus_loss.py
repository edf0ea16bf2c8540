"""Loss of a corpus, document by document: no packing, so that nothing but the text and the model decides it.

A causal model reads long documents in windows that move by a stride; every token is predicted once, from at least
`context - stride` tokens before it. A masked model reads windows side by side, and its masks depend on the seed and
the window's number alone.

Source: the sliding window of transformers' guide to perplexity; differs in sums over all documents that are divided
once, and in a last window that ends with its document.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from lmssl.data.corpus import Document, check_first_record, list_units, read_chunks
from lmssl.errors import DataError, EvaluationError
from lmssl.evaluate.loss import mean
from lmssl.evaluate.questions import Question, Result
from lmssl.evaluate.reader import Reader
from lmssl.evaluate.score import IntArray, Row, Scores
from lmssl.model.head import IGNORE
from lmssl.objective.masking import Masking
from lmssl.recipe.objective import Masks
from lmssl.recipe.suite import LossEvaluation
from lmssl.tokenizer.offsets import surface_bytes

_AT_ONCE = 256
"""Documents that are encoded at once."""


@dataclass
class _Counts:
    """What is counted while rows are made."""

    documents: int = 0
    text_bytes: float = 0.0
    targets: int = 0
    tokens: int = 0


def prepare_loss(section: LossEvaluation, reader: Reader) -> Question:
    """Read the corpus and make rows of it.

    Raises:
        DataError: the corpus cannot be read.
        EvaluationError: it holds nothing to predict, or a document or window is longer than the model reads.
    """
    where = f"evaluation {section.name!r}"
    context = reader.context_tokens(section.context_tokens, where=where)
    counts, numbers = _Counts(), {}
    if reader.causal:
        stride = section.stride_tokens or context // 2
        if stride >= context:
            raise EvaluationError(
                f"a stride of {stride} leaves no context in windows of {context} tokens, what {reader.what} reads",
                where=where,
                remedy=f"lower stride_tokens to {context - 1} or less",
            )
        rows = list(_causal_rows(section, reader, context, stride, counts))
        numbers = {"stride_tokens": stride} if section.window == "sliding" else {}
    else:
        rows = list(_masked_rows(section, reader, context, counts))
    if not counts.targets:
        raise EvaluationError(
            "the corpus holds nothing to predict", where=where, remedy="point it at text that is not empty"
        )
    if section.window == "sliding":
        numbers["context_tokens"] = context
    return Question(section, rows, lambda scores: _result(counts, numbers, scores), causal=reader.causal)


def windows(num_tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first predicted, end) of the windows of a document, in tokens; each but the first is predicted once.

    >>> list(windows(10, 4, 2))
    [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    """
    predicted = 1
    for start in range(0, num_tokens, stride):
        end = min(start + context, num_tokens)
        if predicted < end:
            yield start, predicted, end
        predicted = end
        if end == num_tokens:
            return


def _causal_rows(section: LossEvaluation, reader: Reader, context: int, stride: int, counts: _Counts) -> Iterator[Row]:
    before, _ = reader.around(section.prefix, where=f"evaluation {section.name!r}")
    for document, ids in _documents(section, reader, counts):
        whole = np.array([*before, *ids], dtype=np.int64)
        counts.text_bytes += document.num_bytes
        if section.window == "document":
            _check_fits(section, reader, document, len(whole))
            cuts: Iterator[tuple[int, int, int]] = iter([(0, 1, len(whole))])
        else:
            cuts = windows(len(whole), context, stride)
        for start, first, end in cuts:
            if first < end:
                counts.targets += end - first
                yield Row(whole[start : end - 1], np.arange(first, end) - start - 1, whole[first:end])


def _masked_rows(section: LossEvaluation, reader: Reader, context: int, counts: _Counts) -> Iterator[Row]:
    before, behind = reader.around(section.prefix, where=f"evaluation {section.name!r}")
    masking = _masking(section, reader)
    surface = surface_bytes(reader.tokenizer)
    room = context - len(before) - len(behind)
    number = 0
    for document, ids in _documents(section, reader, counts):
        if section.window == "document":
            _check_fits(section, reader, document, len(before) + len(ids) + len(behind))
            room = max(1, len(ids))
        length = int(surface[ids].sum())
        for start in range(0, len(ids), room):
            whole = np.array([*before, *ids[start : start + room], *behind], dtype=np.int64)
            # Of one width wherever it stands, for masks of spans depend on it.
            width = max(len(whole), context)
            padded, segments = np.zeros((1, width), np.int64), np.zeros((1, width), np.int32)
            padded[0, : len(whole)], segments[0, : len(whole)] = whole, 1
            masked = masking.mask(padded, segments, np.array([number]), evaluation=True)
            number += 1
            kept = masked.targets_BC[0] != IGNORE
            if not kept.any():
                continue
            targets = masked.targets_BC[0][kept]
            counts.targets += len(targets)
            counts.text_bytes += document.num_bytes * int(surface[targets].sum()) / max(1, length)
            yield Row(masked.ids_BT[0, : len(whole)], masked.places_BC[0][kept], targets)


def _masking(section: LossEvaluation, reader: Reader) -> Masking:
    reader.mask_id  # noqa: B018  says what is missing
    masks = Masks(
        evaluation_rate=section.mask_rate,
        strategy=section.mask_strategy,
        mask_share=section.mask_share,
        random_share=section.random_share,
    )
    return Masking.of(masks, reader.tokenizer, section.seed, 1)


def _documents(section: LossEvaluation, reader: Reader, counts: _Counts) -> Iterator[tuple[Document, IntArray]]:
    """Documents with their ids, up to the budget."""
    documents = _read(section)
    while some := list(islice(documents, _AT_ONCE)):
        for document, ids in zip(some, reader.encode([document.text for document in some]), strict=True):
            counts.documents += 1
            counts.tokens += len(ids)
            yield document, ids
            if section.tokens is not None and counts.tokens >= section.tokens:
                return


def _read(section: LossEvaluation) -> Iterator[Document]:
    units = list_units(section.corpus)
    check_first_record(units)
    num_bad = 0
    for unit in units:
        for chunk in read_chunks(unit, max_bad_records=sys.maxsize):
            num_bad += len(chunk.bad)
            if num_bad > section.max_bad_records:
                part, first = chunk.bad[0]
                raise DataError(
                    f"{num_bad} unreadable records; one of them: {first.reason}",
                    where=f"{unit.parts[part].path}, record {first.number} (at {first.start})",
                    remedy=f"repair the file, or raise max_bad_records of evaluation {section.name!r}",
                )
            yield from chunk.documents


def _check_fits(section: LossEvaluation, reader: Reader, document: Document, num_tokens: int) -> None:
    if reader.longest_tokens is not None and num_tokens > reader.longest_tokens:
        raise EvaluationError(
            f"a document has {num_tokens} tokens, and {reader.what} reads at most {reader.longest_tokens}: "
            f"{document.text[:40]!r}...",
            where=f"evaluation {section.name!r}, record {document.record}",
            remedy="use window: sliding, or cut documents with section_bytes",
        )


def _result(counts: _Counts, numbers: dict[str, int], scores: Scores) -> Result:
    nats = float(scores.nats.sum())
    loss = mean(nats, counts.targets)
    return Result(
        {
            "loss": loss,
            "perplexity": math.exp(loss) if loss is not None and loss < 700 else None,
            "bits_per_byte": mean(nats / math.log(2), counts.text_bytes),
            "accuracy": int(scores.num_right.sum()) / counts.targets,
            "num_targets": counts.targets,
            "num_bytes": counts.text_bytes,
            "num_documents": counts.documents,
            **numbers,
        }
    )
