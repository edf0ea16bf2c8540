"""How a model reads texts: its tokenizer, what stands around a text, and the rows that say how likely one is.

Of a causal model a text is one row. Of a masked model it is a row for each token that is predicted, with that token
hidden: the sum is a pseudo-log-likelihood.

Source: Salazar et al. 2020 for pseudo-log-likelihoods; Kauf and Ivanova 2023 for hiding the rest of the word too,
without which the visible end of a rare word gives its beginning away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from lmssl.errors import EvaluationError
from lmssl.evaluate.score import IntArray, Row
from lmssl.tokenizer.encode import Encoder
from lmssl.tokenizer.load import Tokenizer
from lmssl.tokenizer.words import WordStarts

DEFAULT_CONTEXT_TOKENS = 1024
"""Of windows, where neither the suite nor the model asks for less."""

Likelihood = Literal["causal", "masked"]


@dataclass(frozen=True)
class Text:
    """A text as the model reads it."""

    ids: IntArray
    """With what stands around it."""
    places: IntArray
    """Its own tokens, of which the likelihood is asked."""


@dataclass(frozen=True, eq=False)
class Reader:
    """Makes rows of texts for a model."""

    tokenizer: Tokenizer
    kind: Likelihood | None
    """How likely texts are by it; None: it does not say."""
    longest_tokens: int | None = None
    """What the model reads at most, tokens around the text included; None: no limit."""
    begins_with_bos: bool = False
    """Whether the run put bos before each document."""
    what: str = "the model"
    """What a person calls the model."""

    @property
    def causal(self) -> bool:
        """Whether the model reads from left to right.

        Raises:
            EvaluationError: it gives no likelihoods.
        """
        if self.kind is None:
            raise EvaluationError(
                f"{self.what} gives no likelihood of a text",
                where="its config",
                remedy="likelihoods need a causal or a masked model; of ELECTRA, evaluate the folder `generator`; of "
                "T5, `lmssl eval RUN` without a suite gives the loss of spans of held-out text",
            )
        return self.kind == "causal"

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer, report=lambda _line: None)

    @cached_property
    def _words(self) -> WordStarts:
        return WordStarts.of(self.tokenizer)

    def context_tokens(self, asked: int | None, *, where: str) -> int:
        """Tokens of a window.

        Raises:
            EvaluationError: the model does not read so many.
        """
        if asked is not None and self.longest_tokens is not None and asked > self.longest_tokens:
            raise EvaluationError(
                f"windows of {asked} tokens are longer than the {self.longest_tokens} that {self.what} reads",
                where=where,
                remedy=f"lower context_tokens to {self.longest_tokens} or less, or leave it out",
            )
        return asked or min(self.longest_tokens or DEFAULT_CONTEXT_TOKENS, DEFAULT_CONTEXT_TOKENS)

    def around(self, prefix: str, *, where: str) -> tuple[list[int], list[int]]:
        """Ids before and behind each text.

        Raises:
            EvaluationError: a token that is asked for does not exist, or the model cannot have it there.
        """
        plain = self.tokenizer.backend.encode("a", add_special_tokens=False).ids
        whole = self.tokenizer.backend.encode("a").ids
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        before, behind = list(whole[:start]), list(whole[start + len(plain) :])
        if prefix == "none":
            return [], []
        if not self.causal:
            if prefix != "auto":
                raise EvaluationError(
                    f"prefix: {prefix} is for causal models, and {self.what} is a masked one",
                    where=where,
                    remedy="leave prefix out, or set it to none",
                )
            return before, behind
        if prefix == "auto":
            bos = self.tokenizer.bos_id
            return [bos] if self.begins_with_bos and bos is not None and not before else before, []
        token = getattr(self.tokenizer, f"{prefix}_id")
        if token is None:
            raise EvaluationError(
                f"the tokenizer has no {prefix} token", where=where, remedy="leave prefix out, or set it to none"
            )
        return [token], []

    def encode(self, texts: Sequence[str]) -> list[IntArray]:
        """Ids of each text, without anything around it; text that spells a control token stays text."""
        encoded = self._encoder.encode(texts)
        return np.split(encoded.ids.astype(np.int64), encoded.ends[:-1]) if len(texts) else []

    def texts(self, sentences: Sequence[str], prefix: str, places_of: Sequence[str], *, where: str) -> list[Text]:
        """Whole sentences as the model reads them.

        Args:
            places_of: where each sentence is from, for errors.
        Raises:
            EvaluationError: one is longer than the model reads.
        """
        before, behind = self.around(prefix, where=where)
        return [
            self.text(ids, before, behind, 0, place)
            for ids, place in zip(self.encode(sentences), places_of, strict=True)
        ]

    def text(self, ids: IntArray, before: Sequence[int], behind: Sequence[int], first: int, place: str) -> Text:
        """A text of which the tokens from `first` on are asked.

        Raises:
            EvaluationError: it is longer than the model reads.
        """
        whole = np.array([*before, *ids, *behind], dtype=np.int64)
        if self.longest_tokens is not None and len(whole) > self.longest_tokens:
            raise EvaluationError(
                f"the text has {len(whole)} tokens, and {self.what} reads at most {self.longest_tokens}",
                where=place,
                remedy="shorten it, or take it out of the file",
            )
        places = np.arange(len(before) + first, len(before) + len(ids), dtype=np.int64)
        return Text(whole, places[places > 0] if self.causal else places)

    def rows(self, text: Text, *, within_word: bool) -> list[Row]:
        """Rows whose summed nats are those of a text.

        Raises:
            EvaluationError: a masked model's tokenizer has no mask token.
        """
        if self.causal:
            # The last token is only predicted.
            return [Row(text.ids[:-1], text.places - 1, text.ids[text.places])]
        mask_id = self.mask_id
        rows = []
        ends = self._word_ends(text) if within_word else text.places + 1
        for place, end in zip(text.places.tolist(), ends.tolist(), strict=True):
            ids = text.ids.copy()
            ids[place:end] = mask_id
            rows.append(Row(ids, np.array([place]), text.ids[place : place + 1]))
        return rows

    @property
    def mask_id(self) -> int:
        """The id that hides a token.

        Raises:
            EvaluationError: there is none.
        """
        if self.tokenizer.mask_id is None:
            raise EvaluationError(
                "the tokenizer has no mask token, and a masked model is asked by it",
                where=str(self.tokenizer.path),
                remedy="name a mask_token in tokenizer_config.json",
            )
        return self.tokenizer.mask_id

    def _word_ends(self, text: Text) -> npt.NDArray[np.int64]:
        """Where the word of each of the text's places ends."""
        segments = np.ones((1, len(text.ids)), np.int32)
        starts = np.flatnonzero(self._words.starts(text.ids[None], segments)[0])
        after = np.append(starts, text.places[-1] + 1 if len(text.places) else 0)
        found = after[np.searchsorted(starts, text.places, side="right")]
        ends: npt.NDArray[np.int64] = np.minimum(found, text.places[-1] + 1 if len(text.places) else 0)
        return ends


@dataclass(frozen=True)
class Asked:
    """Texts whose likelihoods are wanted, as rows; equal texts are asked once, so that they tie exactly."""

    rows: list[Row]
    of_row: IntArray
    """Which text a row belongs to, by its number among the different ones."""
    number: IntArray
    """Of each text given, its number among the different ones."""

    @classmethod
    def of(cls, reader: Reader, texts: Sequence[Text], *, within_word: bool) -> Asked:
        """The rows of some texts."""
        numbers: dict[tuple[bytes, int], int] = {}
        rows: list[Row] = []
        of_row: list[int] = []
        given = []
        for text in texts:
            key = (text.ids.tobytes(), len(text.places))
            if key not in numbers:
                made = reader.rows(text, within_word=within_word)
                rows += made
                of_row += [len(numbers)] * len(made)
                numbers[key] = len(numbers)
            given.append(numbers[key])
        return cls(rows, np.array(of_row, dtype=np.int64), np.array(given, dtype=np.int64))

    def log_likelihoods(self, nats: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Of each text given, from the nats of the rows."""
        sums = np.zeros(int(self.number.max(initial=-1)) + 1)
        np.add.at(sums, self.of_row, nats)
        return -sums[self.number]


def ties(first: float, second: float) -> bool:
    """Whether two likelihoods differ by no more than what float32 sums do.

    >>> ties(-20.0, -20.00001), ties(-20.0, -20.001)
    (True, False)
    """
    return abs(first - second) <= 1e-6 * max(abs(first), abs(second))
