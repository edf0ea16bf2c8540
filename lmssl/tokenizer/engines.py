"""What turns text into ids: `tokenizers`, the reference, and two faster ones that must agree with it."""

from __future__ import annotations

import ctypes
import re
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import psutil
import tokenizers

_BATCH_BYTES = 4 << 20
_SMALL_BATCH = 16 << 10
"""Characters that one thread encodes sooner than several."""
_MAX_TEXT_BYTES = 96 << 20
"""Text that one core encodes with one instance of gigatoken, whose caches take about 25 MB by then and would double."""
_MAX_GROWTH_BYTES = 64 << 20
"""By how much the process may grow for each core that encodes, before fresh instances take over sooner: text of words
that never come again fills the caches at once."""

_LOOK_BYTES = 6 << 20
"""Text between two looks at that; what threads freed meanwhile goes back to the system, for 3 % of the time."""
_ALL_CORES = min(psutil.cpu_count() or 1, 8)
"""What a call on all cores may fill: each core has caches of its own, and many of them would take gigabytes."""


class Encoded(NamedTuple):
    """Ids of some documents, one after the other."""

    ids: npt.NDArray[np.unsignedinteger[Any]]
    """Shape [tokens], in the type that the engine was opened with."""
    ends: npt.NDArray[np.int64]
    """Shape [documents]: where in `ids` each document ends."""


class Engine(Protocol):
    """Anything that turns texts into ids."""

    def encode(self, raws: Sequence[bytes]) -> Encoded:
        """Ids of texts in UTF-8."""


class ReferenceEngine:
    """`tokenizers`, the reference."""

    def __init__(self, content: str, dtype: np.dtype[Any]) -> None:
        self._backend = tokenizers.Tokenizer.from_str(content)
        self._backend.encode_special_tokens = True
        self._dtype = dtype

    def encode(self, raws: Sequence[bytes]) -> Encoded:
        """Ids of texts in UTF-8."""
        arrays: list[npt.NDArray[np.unsignedinteger[Any]]] = []
        for batch in _batches(raws):
            texts = [raw.decode() for raw in batch]
            if sum(map(len, texts)) <= _SMALL_BATCH:  # its pool of threads would wait until a core is free
                encodings = [self._backend.encode(text, add_special_tokens=False) for text in texts]
            else:
                encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            arrays.extend(np.array(encoding.ids, dtype=self._dtype) for encoding in encodings)
        ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        return Encoded(np.concatenate(arrays) if arrays else np.empty(0, self._dtype), ends)


@dataclass
class _Instance:
    """A tokenizer of gigatoken."""

    backend: Any
    num_bytes: int = 0
    """Text that it encoded."""


class _Gigatoken:
    """gigatoken; its caches grow with the words it meets, so fresh instances take over now and then.

    How much they take it does not tell; the text they encoded bounds it where words come again, as they do, and the
    growth of the process where they do not. Where something else grows, instances are renewed for nothing, once. Each
    call has an instance to itself: one instance encodes for one thread at a time.
    """

    def __init__(self, content: str, threads: int, dtype: np.dtype[Any]) -> None:
        self._content = content
        self._dtype = dtype
        self._threads = threads
        self._max_text_bytes = _MAX_TEXT_BYTES * (1 if threads else _ALL_CORES)
        self._max_growth_bytes = _MAX_GROWTH_BYTES * (threads or _ALL_CORES)
        self._lock = threading.Lock()
        self._process = psutil.Process()
        self._num_bytes = 0
        self._idle = [self._new()]
        self._generation = 0
        self._began_bytes = self._process.memory_info().rss

    def encode(self, raws: Sequence[bytes]) -> Encoded:
        if not raws:
            return Encoded(np.empty(0, self._dtype), np.empty(0, np.int64))
        generation, instance = self._take(sum(map(len, raws)))
        if self._threads == 1:
            arrays = [instance.backend.encode(raw) for raw in raws]
            found = np.concatenate(arrays, dtype=self._dtype, casting="same_kind")  # one pass; `astype` is another
            ends = np.cumsum([len(array) for array in arrays])
        else:
            layout = instance.backend.encode_batch(list(raws), parallel=not self._threads).layout
            offsets = np.asarray(layout.offsets.data, dtype=np.int64)
            found = np.asarray(layout.content.data)[offsets[0] : offsets[-1]].astype(self._dtype, copy=False)
            ends = offsets[1:] - offsets[0]
        with self._lock:
            if generation == self._generation and instance.num_bytes < self._max_text_bytes:
                self._idle.append(instance)
        return Encoded(found, ends)

    def _take(self, num_bytes: int) -> tuple[int, _Instance]:
        """An instance that nobody has, to encode so much text with."""
        with self._lock:
            self._num_bytes += num_bytes
            if self._num_bytes > _LOOK_BYTES:
                self._num_bytes = 0
                if self._threads:  # else it may be training that encodes, and wants what it freed again
                    _return_freed_memory()
                if self._process.memory_info().rss - self._began_bytes > self._max_growth_bytes:
                    self._idle = []  # the old go before the new come; calls under way keep theirs
                    self._idle = [self._new()]
                    self._generation += 1
                    self._began_bytes = self._process.memory_info().rss
            generation, instance = self._generation, self._idle.pop() if self._idle else None
        instance = instance or self._new()
        instance.num_bytes += num_bytes
        return generation, instance

    def _new(self) -> _Instance:
        import gigatoken

        _return_freed_memory()
        return _Instance(gigatoken.Tokenizer.from_json(self._content))


def _return_freed_memory() -> None:
    """Give the system what was freed; glibc keeps it, and the process would seem to grow and grow."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have none
        trim(0)


class _Tokie:
    """tokie, for texts of characters on which it is known to agree; the others go to the reference."""

    def __init__(self, content: str, reference: Engine, dtype: np.dtype[Any]) -> None:
        import tokie

        self._dtype = dtype
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
        ids = ids.astype(self._dtype, copy=False)
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


def open_tokie(content: str, reference: Engine, dtype: np.dtype[Any]) -> Engine:
    """The fast engine for WordPiece; raises whatever tokie raises where it cannot."""
    return _Tokie(content, reference, dtype)


def open_gigatoken(content: str, threads: int, dtype: np.dtype[Any]) -> Engine:
    """The fast engine for a `tokenizer.json`, see `Encoder`; raises whatever gigatoken raises where it cannot."""
    return _Gigatoken(content, threads, dtype)


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
