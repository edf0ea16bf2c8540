"""Text to ids: the reference engine, and a faster one that must agree with it."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson

from lmssl.errors import TokenizerError
from lmssl.tokenizer.engines import Encoded, Engine, ReferenceEngine, open_gigatoken, open_tokie
from lmssl.tokenizer.load import Tokenizer
from lmssl.tokenizer.split import PIECE_BYTES, can_cut, cut_out, cut_text

_SAMPLE_BYTES = 1024
_SAMPLE_SHARE = 4096
_ENOUGH_BYTES = _SAMPLE_BYTES // 4
"""What may be left of a sample's budget: a piece more costs the reference a millisecond."""
_LONG_PIECE_BYTES = 1 << 20
"""Pieces for an engine that encodes on one thread, to which many short ones only cost more calls."""
_MAX_CHECKED_BYTES = 4 * _SAMPLE_BYTES
"""A longer stretch without a place to cut is not checked as it stands: the reference takes 200 times its memory."""

_MARK = "\ufdd0"
"""Begins the new names of control tokens; Unicode reserves it for such inner use."""


class Encoder:
    """Encodes documents without special tokens; control-token text inside a document stays plain text.

    Several threads may share one. `threads`: 0: a call of gigatoken runs on all cores; else so many threads call, and
    each encodes for itself, with less work in all; one alone keeps other threads waiting, with a fifth less again.
    `dtype`: of the ids; it must hold all of the tokenizer's.

    `engine="auto"` uses gigatoken (byte-level BPE) or tokie (WordPiece) where it is installed and agrees with
    `tokenizers` on adversarial text, now and on a sample of every call; the first difference is reported and ends
    its use. `report` receives that line; without it, it is a warning.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        engine: Literal["auto", "reference"] = "auto",
        report: Callable[[str], None] | None = None,
        *,
        threads: int = 0,
        dtype: npt.DTypeLike = np.uint32,
    ) -> None:
        if engine not in ("auto", "reference"):
            raise TokenizerError(f"there is no engine {engine!r}", remedy="use auto or reference")
        content = plain_content(tokenizer)
        self._report = report if report is not None else _warn
        for token in content["added_tokens"]:
            if token["special"] and not token["content"].startswith(_MARK):
                self._report(
                    f"merges of this tokenizer build {token['content']!r}, so text gives that control token's id"
                )
        self._can_cut = can_cut(content)
        self._piece_bytes = _LONG_PIECE_BYTES if threads else PIECE_BYTES
        text = orjson.dumps(content).decode()
        dtype = np.dtype(dtype)
        self._reference = ReferenceEngine(text, dtype)
        self._fast: Engine | None = None
        self._calls = 0
        self._name = _fast_engine(content)
        if engine == "auto" and self._name and importlib.util.find_spec(self._name):
            raws = [adversarial.encode() for adversarial in adversarial_texts(tokenizer)]
            self._adopt(text, raws, threads, dtype)

    @property
    def engine(self) -> str:
        """Name of the engine in use: `gigatoken`, `tokie` or `tokenizers`."""
        return "tokenizers" if self._fast is None or self._name is None else self._name

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode whole documents.

        Raises:
            TokenizerError: a document holds a lone surrogate, which is not text.
        """
        return self.encode_utf8([_utf8(text, i) for i, text in enumerate(texts)])

    def encode_utf8(self, raws: Sequence[bytes]) -> Encoded:
        """Encode whole documents, given as UTF-8 that is known to be valid."""
        if self._fast is None:
            cuts = [list(self.parts(raw, PIECE_BYTES)) for raw in raws]
            encoded = self._reference.encode([piece for cut in cuts for piece in cut])
            return Encoded(encoded.ids, encoded.ends[np.cumsum([len(cut) for cut in cuts], dtype=np.int64) - 1])
        self._calls += 1
        chosen, excerpts = _sample(raws, self._calls, self._can_cut)
        pieces, last, checked = self._cut(raws, chosen)
        return self._encode_fast(self._fast, pieces, last, checked, excerpts)

    def parts(self, raw: bytes, size: int) -> Iterator[bytes]:
        """A document in parts of about `size` bytes, whose ids joined are its own; whole where no cut is safe."""
        return cut_text(raw, size) if self._can_cut else iter((raw,))

    def _cut(
        self, raws: Sequence[bytes], chosen: dict[int, list[bytes]]
    ) -> tuple[list[bytes], npt.NDArray[np.int64], list[int]]:
        """Pieces, the last piece of each document, and the pieces to check."""
        pieces: list[bytes] = []
        last = np.empty(len(raws), dtype=np.int64)
        checked = list[int]()
        for i, raw in enumerate(raws):
            parts = chosen.get(i, [raw])
            for number, part in enumerate(parts):
                if i in chosen and number == len(parts) // 2:
                    checked.append(len(pieces))
                pieces += self.parts(part, self._piece_bytes)
            last[i] = len(pieces) - 1
        return pieces, last, checked

    def _encode_fast(
        self,
        fast: Engine,
        pieces: list[bytes],
        last: npt.NDArray[np.int64],
        checked: list[int],
        excerpts: list[bytes],
    ) -> Encoded:
        texts = pieces + excerpts
        try:
            encoded = fast.encode(texts)
            wrong = _first_difference(encoded, self._reference, texts, [*checked, *range(len(pieces), len(texts))])
        except Exception as error:  # a foreign engine may raise anything; the reference stands ready
            self._abandon(f"raised {type(error).__name__}: {error}")
            encoded, wrong = self._reference.encode(pieces), None
        if wrong is not None:
            self._abandon(f"encoded {_shorten(texts[wrong])} differently")
            encoded = self._reference.encode(pieces)
        ends = encoded.ends[last]
        return Encoded(encoded.ids[: ends[-1]] if len(ends) else encoded.ids[:0], ends)

    def _adopt(self, content: str, raws: list[bytes], threads: int, dtype: np.dtype[Any]) -> None:
        try:
            fast = (
                open_gigatoken(content, threads, dtype)
                if self._name == "gigatoken"
                else open_tokie(content, self._reference, dtype)
            )
            wrong = _first_difference(fast.encode(raws), self._reference, raws, range(len(raws)))
        except Exception as error:  # see above
            self._abandon(f"refused this tokenizer: {error}")
            return
        if wrong is not None:
            self._abandon(f"encoded {_shorten(raws[wrong])} differently")
            return
        self._fast = fast

    def _abandon(self, why: str) -> None:
        self._fast = None
        self._report(
            f"{self._name} {' '.join(why.split())}; encoding with tokenizers from here on, the slower reference"
        )


def plain_content(tokenizer: Tokenizer) -> dict[str, Any]:
    """The `tokenizer.json` of a copy that gives the same ids and in which no text spells a control token.

    Control tokens are renamed, in vocabulary and added tokens alike: without that, a Unigram model or an
    `ignore_merges` BPE finds `[CLS]` in its vocabulary as an ordinary piece. One that merges build keeps its name.
    """
    content: dict[str, Any] = orjson.loads(tokenizer.backend.to_str())
    model, names = content["model"], {}
    built = {_merged(pair) for pair in model.get("merges") or []}
    for token in content["added_tokens"]:
        if token["special"] and token["content"] not in built:
            names[token["content"]] = f"{_MARK}{tokenizer.fingerprint[:32]}:{token['id']}"
            token["content"] = names[token["content"]]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "dropout" in model:
        model["dropout"] = None  # ids must not be random
    for key in ("padding", "truncation", "post_processor"):
        content[key] = None
    return content


def adversarial_texts(tokenizer: Tokenizer) -> list[str]:
    """Short documents on which encoders have been seen to differ, with the tokenizer's control tokens among them."""
    texts = [
        "",
        " ",
        "a" * 3000,
        "ab" * 1500 + "a" * 1499 + "b",
        "word" + " " * 1999 + "word   \t  \t\t end   ",
        "\n\n\n \n\r\n\r\n\r \t\n x\r\ny\u0085z\u00a0\u2003\u3000q\u200b",
        "a\0b\0\0 \x01\x1c\x7f\ufeff\ufffd\uffff\U0010ffff",
        "Straße Ελληνικά русский עברית العربية हिन्दी ไทย 한국어 ㄱㄴ ﬁ ǅ İı \u017f",
        "我能吞下玻璃而不伤身体。日本語のテキスト、カタカナ漢字" * 20,
        "👨\u200d👩\u200d👧\u200d👦🏳\ufe0f\u200d🌈👍🏽🇩🇪🇫🇷 ☎\ufe0f #\ufe0f\u20e3",
        "\u0301\u0300 a\u0301\u0327 \u0327\u0301e\u0301\u0301\u0301 \u0e33\u0f71\u0f72",
        "1 12 123 1234 12345 " + "0123456789" * 100 + " ½²①Ⅷ٣४ 1,234.56e-7",
        "x" * 50 + "y_" * 5000 + "Z" * 5000,
        "def f(x):\n\tif x:\n        return {'a': [1, 2]}  # don't, I'LL, we'Ve 'S's''\n\n\n",
        "'tis he's they're I'd 'twas “quoted” — dash… ###!!!???...,,, ~~~\n$$ %%\r\n///",
        " leading and trailing ",
    ]
    for token in tokenizer.backend.get_added_tokens_decoder().values():
        texts += [token.content, f"a{token.content}b {token.content}\n{token.content}{token.content}"]
    return texts


def _fast_engine(content: dict[str, Any]) -> str | None:
    """Which fast engine serves a `tokenizer.json`; tokie is wrong for BPE on repeated letters, and for Unigram."""
    if content["model"]["type"] == "BPE" and '"ByteLevel"' in json.dumps(content["pre_tokenizer"]):
        return "gigatoken"
    return "tokie" if content["model"]["type"] == "WordPiece" else None


def _merged(pair: str | list[str]) -> str:
    return "".join(pair.split(" ", 1) if isinstance(pair, str) else pair)


def _utf8(text: str, number: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"document {number} holds a lone surrogate, U+{ord(text[error.start]):04X}",
            where=f"document {number}, character {error.start}",
            remedy="decode the text with errors='replace', or drop the document",
        ) from error


def _spread(number: int) -> float:
    """A place in [0, 1); those of consecutive numbers lie far apart."""
    return number * 0.7548776662466927 % 1.0


def _sample(raws: Sequence[bytes], salt: int, can_cut: bool) -> tuple[dict[int, list[bytes]], list[bytes]]:
    """What to check, about 1/4096 of the text, of other documents in each call.

    Documents in parts, of which the middle one is checked; and, of texts such as Chinese that have no space to cut at
    for long, excerpts that are encoded once more, by both engines.
    """
    budget = max(_SAMPLE_BYTES, sum(map(len, raws)) // _SAMPLE_SHARE)
    chosen, excerpts, seen = dict[int, list[bytes]](), list[bytes](), set[int]()
    for k in range(len(raws)):
        if budget <= _ENOUGH_BYTES:
            break
        i = int((_spread(salt) + k * 0.6180339887498949) % 1.0 * len(raws))
        if i in seen:
            continue
        seen.add(i)
        raw = raws[i]
        parts, place = [raw], int(_spread(salt + i) * max(0, len(raw) - 2 * _SAMPLE_BYTES))
        if can_cut and len(raw) > _MAX_CHECKED_BYTES:
            parts = cut_out(raw, place, _SAMPLE_BYTES)
        found = parts[len(parts) // 2]
        if len(found) <= _MAX_CHECKED_BYTES:
            chosen[i] = parts
        else:
            found = _excerpt(raw, place, _SAMPLE_BYTES)
            excerpts.append(found)
        budget -= len(found) + 16
    return chosen, excerpts


def _excerpt(raw: bytes, place: int, size: int) -> bytes:
    """About `size` bytes of UTF-8 from about `place` on, in whole characters."""
    return raw[place : place + size].decode(errors="ignore").encode()


def _first_difference(encoded: Encoded, reference: Engine, raws: Sequence[bytes], sample: Sequence[int]) -> int | None:
    if len(encoded.ends) != len(raws):
        raise ValueError(f"{len(encoded.ends)} results for {len(raws)} texts")
    expected = reference.encode([raws[i] for i in sample])
    starts = np.concatenate([[0], encoded.ends])
    begin = 0
    for i, end in zip(sample, expected.ends, strict=True):
        if not np.array_equal(encoded.ids[starts[i] : starts[i + 1]], expected.ids[begin:end]):
            return i
        begin = int(end)
    return None


def _shorten(raw: bytes) -> str:
    text = raw[:240].decode(errors="ignore")
    return ascii(text if len(text) <= 60 and len(raw) <= 240 else text[:60] + "...")


def _warn(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=4)
