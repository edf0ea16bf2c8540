"""What turns text into ids: `tokenizers`, the reference, and two faster ones that must agree with it."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers

from lmssl.tokenizer.split import PIECE_BYTES

_BATCH_BYTES = 4 << 20
_MAX_CACHED_BYTES = 192 << 20
"""What the words in gigatoken's caches may take, estimated, before a fresh instance takes over."""

_WORD_SHARE = 128
"""One text in so many is looked at for that; a word costs its bytes and these many more:"""

_WORD_BYTES = 64


class Encoded(NamedTuple):
    """Ids of some documents, one after the other."""

    ids: npt.NDArray[np.uint32]
    """Shape [tokens]."""
    ends: npt.NDArray[np.int64]
    """Shape [documents]: where in `ids` each document ends."""


class Engine(Protocol):
    """Anything that turns texts into ids."""

    def encode(self, raws: Sequence[bytes]) -> Encoded:
        """Ids of texts in UTF-8."""


class ReferenceEngine:
    """`tokenizers`, the reference."""

    def __init__(self, content: str) -> None:
        self._backend = tokenizers.Tokenizer.from_str(content)
        self._backend.encode_special_tokens = True

    def encode(self, raws: Sequence[bytes]) -> Encoded:
        """Ids of texts in UTF-8."""
        arrays: list[npt.NDArray[np.uint32]] = []
        for batch in _batches(raws):
            encodings = self._backend.encode_batch_fast([raw.decode() for raw in batch], add_special_tokens=False)
            arrays.extend(np.array(encoding.ids, dtype=np.uint32) for encoding in encodings)
        ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        return Encoded(np.concatenate(arrays) if arrays else np.empty(0, np.uint32), ends)


class _Gigatoken:
    """gigatoken; its caches grow with the text, so a fresh instance takes over now and then."""

    def __init__(self, content: str, all_cores: bool) -> None:
        self._content = content
        self._all_cores = all_cores
        self._lock = threading.Lock()
        self._renew()

    def encode(self, raws: Sequence[bytes]) -> Encoded:
        if not raws:
            return Encoded(np.empty(0, np.uint32), np.empty(0, np.int64))
        with self._lock:
            if self._cached_bytes > _MAX_CACHED_BYTES:
                self._renew()
            self._estimate(raws)
            backend = self._backend
        if not self._all_cores:
            arrays = [backend.encode(raw) for raw in raws]
            return Encoded(np.concatenate(arrays), np.cumsum([len(array) for array in arrays], dtype=np.int64))
        layout = backend.encode_batch(list(raws)).layout  # calls of several threads run at the same time
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        ids = np.asarray(layout.content.data, dtype=np.uint32)[offsets[0] : offsets[-1]]
        return Encoded(ids, offsets[1:] - offsets[0])

    def _renew(self) -> None:
        import gigatoken

        self._backend = gigatoken.Tokenizer.from_json(self._content)
        self._words = set[bytes]()
        self._num_texts = self._seen_bytes = self._word_bytes = 0
        self._before = 0, 0
        self._cached_bytes = 0.0

    def _estimate(self, raws: Sequence[bytes]) -> None:
        """Look at the words of one text in 128, and from these tell what all words take.

        New words come ever more seldom: their bytes grow as a power of the text's, near 0.6 for natural language
        (Heaps' law) and 1 for a dump of hashes. How they grew just now gives the exponent.
        """
        for raw in raws[-self._num_texts % _WORD_SHARE :: _WORD_SHARE]:
            new = set(raw[:PIECE_BYTES].split()) - self._words
            self._words |= new
            self._seen_bytes += min(len(raw), PIECE_BYTES)
            self._word_bytes += sum(map(len, new)) + _WORD_BYTES * len(new)
        self._num_texts += len(raws)
        seen, word_bytes = self._before
        if self._seen_bytes > 1.25 * seen or self._word_bytes > 1.25 * word_bytes:
            growth = (self._word_bytes - word_bytes) / (self._seen_bytes - seen)
            exponent = min(1.0, growth * self._seen_bytes / max(1, self._word_bytes))
            self._cached_bytes = self._word_bytes * _WORD_SHARE**exponent
            self._before = self._seen_bytes, self._word_bytes


class _Tokie:
    """tokie, for texts of characters on which it is known to agree; the others go to the reference."""

    def __init__(self, content: str, reference: Engine) -> None:
        import tokie

        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            self._backend: Any = tokie.Tokenizer.from_json(file.name)
        self._reference = reference

    def encode(self, raws: Sequence[bytes]) -> Encoded:
        plain = [raw.decode() for raw in raws]
        odd = [i for i, text in enumerate(plain) if TOKIE_ODD.search(text)]
        for i in odd:
            plain[i] = ""
        ids, lengths = self._backend.encode_batch_flat(plain, add_special_tokens=False)
        ends = np.cumsum(lengths.astype(np.int64))
        if not odd:
            return Encoded(ids, ends)
        slow = self._reference.encode([raws[i] for i in odd])
        pieces, done, begin = [], 0, 0
        for i, end in zip(odd, slow.ends.tolist(), strict=True):
            pieces += [ids[done : ends[i]], slow.ids[begin:end]]
            done, begin = int(ends[i]), end
        lengths = lengths.astype(np.int64)
        lengths[odd] = np.diff(slow.ends, prepend=0)
        return Encoded(np.concatenate([*pieces, ids[done:]]), np.cumsum(lengths))


TOKIE_ODD = re.compile(
    "[^\0-\x7e\x80-\u0377\u03a3-\u052f\u0531-\u0556\u1e00-\u1eff\u2000-\u2064\u20a0-\u20c0\u2100-\u218b\u2190-\u2429"
    "\u2460-\u2b73\u3041-\u3096\u3099-\u30ff\u3220-\ua48c\uac00-\ud7a3\uff01-\uffbe]"
)
"""Characters that tokie 0.1.4 normalises in another way, or may: unassigned ones, marks and signs of rare scripts."""


def open_tokie(content: str, reference: Engine) -> Engine:
    """The fast engine for WordPiece; raises whatever tokie raises where it cannot."""
    return _Tokie(content, reference)


def open_gigatoken(content: str, all_cores: bool) -> Engine:
    """The fast engine for a `tokenizer.json`; raises whatever gigatoken raises where it cannot."""
    return _Gigatoken(content, all_cores)


def _batches(raws: Sequence[bytes]) -> list[list[bytes]]:
    batches: list[list[bytes]] = []
    room = 0
    for raw in raws:
        if room <= 0:
            batches.append([])
            room = _BATCH_BYTES
        batches[-1].append(raw)
        room -= len(raw)
    return batches
