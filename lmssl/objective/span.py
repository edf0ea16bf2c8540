"""Span corruption: runs of tokens are replaced by sentinels, and the decoder writes out what they stand for.

Every segment is an example of its own. As many examples stand in a row of the encoder and of the decoder as segments
in the sequence.

Shapes: B sequences, T tokens, E tokens of a row of the encoder, O of the decoder, K spans of an example, N flattened
targets, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmssl.data.batch import SequenceBatch
from lmssl.model.head import IGNORE, chunk_size, loss_and_correct, output_weight
from lmssl.objective.base import MicroBatch, SumObjective
from lmssl.objective.draws import uniforms
from lmssl.objective.masked import masked_bytes
from lmssl.objective.needs import span_ids
from lmssl.recipe.objective import SpanObjective as SpanSection
from lmssl.tokenizer.load import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IntArray = npt.NDArray[np.int64]

LEVELS = (32, 8, 2)
"""Rows are as long as examples of so many tokens can make them; the last holds whatever a sequence can.

Short examples gain more by sentinels and ends than spans take away. Three shapes instead of the worst one for all:
the compiler meets a second one only where text is that short.
"""


class Spans(NamedTuple):
    """How many tokens of an example are hidden, in how many spans."""

    num_hidden: int
    num_spans: int


@dataclass(frozen=True)
class Corruption:
    """T5's choice of spans, in fixed capacities.

    Source: `random_spans_noise_mask` of T5 (Raffel et al. 2020): hidden tokens are `round(tokens * rate)`, spans
    `round(hidden / mean_span_tokens)`, each at least 1; hidden and kept tokens are each cut into as many parts at
    random, and alternate, beginning with kept ones. Differs in keying by (seed, position), in a bound on the number of
    spans, that of the sentinels and of the kept tokens, and in leaving out examples of one token, which can hide none.
    """

    seed: int
    rate: float
    mean_span_tokens: float
    sentinels: tuple[int, ...]
    """Ids of `<extra_id_0>`, `<extra_id_1>` and so on; every example begins with the first."""
    eos_id: int
    """Ends each example in the encoder and in the decoder."""
    pad_id: int
    """Fills rows, and begins each example in the decoder."""

    @classmethod
    def of(cls, section: SpanSection, tokenizer: Tokenizer, seed: int) -> Corruption:
        """The corruption a recipe asks for.

        Raises:
            TokenizerError: the tokenizer lacks sentinels, or an eos or pad token.
        """
        ids = span_ids(tokenizer)
        return cls(seed, section.rate, section.mean_span_tokens, ids.sentinels, ids.eos, ids.pad)

    def spans(self, num_tokens: int) -> Spans:
        """What is hidden of an example of at least two tokens.

        >>> Corruption(1, 0.15, 3.0, tuple(range(100)), 1, 0).spans(512)
        Spans(num_hidden=77, num_spans=26)
        """
        num_hidden = min(max(round(num_tokens * self.rate), 1), num_tokens - 1)
        num_spans = max(1, round(num_hidden / self.mean_span_tokens))
        return Spans(num_hidden, min(num_spans, num_hidden, num_tokens - num_hidden, len(self.sentinels)))

    def lengths(self, num_tokens: int) -> tuple[int, int]:
        """Tokens of an example in the encoder and in the decoder, eos included; none where nothing can be hidden."""
        if num_tokens < 2:
            return 0, 0
        num_hidden, num_spans = self.spans(num_tokens)
        return num_tokens - num_hidden + num_spans + 1, num_hidden + num_spans + 1

    def hidden(self, num_tokens: int, numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """The span each token of an example belongs to, from 1, or 0 where it is kept; shape [tokens].

        numbers: one uniform number in [0, 1) per token.
        """
        num_hidden, num_spans = self.spans(num_tokens)
        parts_K2 = np.stack(
            [
                _partition(num_tokens - num_hidden, num_spans, numbers[num_hidden:]),
                _partition(num_hidden, num_spans, numbers[:num_hidden]),
            ],
            axis=1,
        )
        numbers_K2 = np.stack([np.zeros(num_spans, np.int64), np.arange(1, num_spans + 1)], axis=1)
        return np.repeat(numbers_K2.reshape(-1), parts_K2.reshape(-1))

    def example(self, ids: IntArray, spans: IntArray) -> tuple[IntArray, IntArray]:
        """Tokens of the encoder and targets of the decoder, eos included.

        Args:
            ids: tokens of the example.
            spans: as `hidden` gives them.
        """
        hidden = np.flatnonzero(spans)
        number = spans[hidden]
        first = np.flatnonzero(np.diff(number, prepend=0))
        marks = np.array(self.sentinels[: len(first)], dtype=np.int64)
        shown, kept = ids.copy(), spans == 0
        shown[hidden[first]] = marks
        kept[hidden[first]] = True
        answer = np.empty(len(hidden) + len(marks), np.int64)
        answer[np.arange(len(hidden)) + number] = ids[hidden]
        answer[first + np.arange(len(marks))] = marks
        return np.append(shown[kept], self.eos_id), np.append(answer, self.eos_id)


@dataclass(frozen=True, eq=False)
class SpanObjective(SumObjective):
    """The decoder writes each sentinel of the encoder's text with the tokens it stands for, then eos.

    Bits per byte are of the hidden text, and pay for sentinels and eos too.
    """

    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    corruption: Corruption
    surface_bytes: npt.NDArray[np.int64]
    """Bytes of text each id stands for."""

    @property
    def weights(self) -> Mapping[str, float]:
        """One term."""
        return {"span": 1.0}

    def prepare(self, batch: SequenceBatch, *, evaluation: bool = False) -> MicroBatch:
        """Rows of corrupted examples and of what the decoder is to write."""
        corruption = self.corruption
        rows = [
            self._examples(batch.ids_BT[row], batch.segments_BT[row], position, evaluation)
            for row, position in enumerate(batch.positions_B.tolist())
        ]
        lengths = [(sum(len(e[1]) for e in examples), sum(len(e[2]) for e in examples)) for examples in rows]
        num_encoder, num_decoder = self._capacities(batch.ids_BT.shape[1], lengths)
        size = len(rows)
        ids_BE = np.full((size, num_encoder), corruption.pad_id, np.int64)
        read_BO = np.full((size, num_decoder), corruption.pad_id, np.int64)
        targets_BO = np.full((size, num_decoder), IGNORE, np.int64)
        segments_BE, segments_BO = np.zeros_like(ids_BE), np.zeros_like(read_BO)
        for row, examples in enumerate(rows):
            at, to = 0, 0
            for number, source, answer in examples:
                ids_BE[row, at : at + len(source)] = source
                segments_BE[row, at : at + len(source)] = number
                targets_BO[row, to : to + len(answer)] = answer
                read_BO[row, to + 1 : to + len(answer)] = answer[:-1]  # after the pad token that begins an example
                segments_BO[row, to : to + len(answer)] = number
                at, to = at + len(source), to + len(answer)
        inputs = {
            "ids_BE": ids_BE,
            "segments_BE": segments_BE,
            "read_BO": read_BO,
            "segments_BO": segments_BO,
            "targets_BO": targets_BO,
        }
        num_targets = int((targets_BO != IGNORE).sum())
        return MicroBatch(
            inputs={name: torch.from_numpy(array) for name, array in inputs.items()},
            counts={"span": num_targets, "accuracy": num_targets},
            num_bytes=float(masked_bytes(batch, targets_BO, self.surface_bytes).sum()),
            num_padding_tokens=batch.num_padding_tokens,
        )

    def _examples(
        self, ids_T: IntArray, segments_T: npt.NDArray[np.int32], position: int, evaluation: bool
    ) -> list[tuple[int, IntArray, IntArray]]:
        """Of every example of a sequence its segment's number, tokens of the encoder and targets of the decoder."""
        ends = np.cumsum(np.bincount(segments_T)[1:]).tolist()
        key = (self.corruption.seed, "evaluated spans" if evaluation else "spans", position)
        # One number per token of the sequence: those of a segment depend on nothing but the key and its place.
        numbers_T = uniforms(ends[-1] if ends else 0, *key)
        found = []
        for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
            if end - begin > 1:
                spans = self.corruption.hidden(end - begin, numbers_T[begin:end])
                found.append((number, *self.corruption.example(ids_T[begin:end], spans)))
        return found

    def _capacities(self, num_tokens: int, lengths: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """The shortest of the fixed lengths of rows that holds these."""
        levels = capacities(self.corruption, num_tokens)
        return next(c for c in levels if all(e <= c[0] and o <= c[1] for e, o in lengths) or c == levels[-1])

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Summed cross-entropy of what the decoder is to write, and how much of it the model had right."""
        from lmssl.model.encoder import encode_decode

        read = (inputs[name] for name in ("ids_BE", "segments_BE", "read_BO", "segments_BO"))
        hidden_BOD = encode_decode(model, *read)
        targets_N = inputs["targets_BO"].reshape(-1)
        hidden_ND = hidden_BOD.reshape(targets_N.shape[0], -1)
        weight_VD = output_weight(model)
        chunk = chunk_size(targets_N.shape[0], weight_VD.shape[0], device=targets_N.device.type)
        nats, correct = loss_and_correct(hidden_ND, weight_VD, None, targets_N, chunk_targets=chunk)
        return {"span": nats, "accuracy": correct}


@lru_cache
def capacities(corruption: Corruption, num_tokens: int) -> tuple[tuple[int, int], ...]:
    """Fixed lengths of rows in the encoder and the decoder for sequences of `num_tokens`, ascending.

    Where every example has at least m tokens, a row has at most `num_tokens` times the largest ratio that an example
    of m tokens or more has to its own length; the last level takes m = 2, which holds for all.

    >>> capacities(Corruption(1, 0.15, 3.0, tuple(range(100)), 1, 0), 1024)
    ((967, 256), (1152, 409), (1536, 1536))
    """
    each = np.array([corruption.lengths(n) for n in range(2, num_tokens + 1)])
    found = []
    for least in (m for m in LEVELS if m <= num_tokens):
        tokens = np.arange(least, num_tokens + 1)
        # In integers: a bound rounded down must not lose what a division did.
        bounds = [int((each[least - 2 :, side] * num_tokens // tokens).max()) for side in (0, 1)]
        found.append((bounds[0], bounds[1]))
    return tuple(found)


def _partition(count: int, num_parts: int, numbers: npt.NDArray[np.float64]) -> IntArray:
    """Lengths of `num_parts` parts of `count` items, none empty, each such partition as likely as another."""
    cuts = np.sort(np.argsort(numbers[: count - 1], kind="stable")[: num_parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [count]]))
