"""Text to ids: the reference engine, and a faster one that must agree with it."""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers

from lmssl.errors import TokenizerError
from lmssl.tokenizer.load import Tokenizer
from lmssl.tokenizer.split import can_cut, cut_out, cut_text

_BATCH_CHARS = 4 << 20
_RECYCLE_CHARS = 64 << 20
_SAMPLE_CHARS = 4096
_SAMPLE_SHARE = 256
_MARK = "\ufdd0"
"""Begins the new names of control tokens; Unicode reserves it for such inner use."""


class Encoded(NamedTuple):
    """Ids of some documents, one after the other."""

    ids: npt.NDArray[np.uint32]
    """Shape [tokens]."""
    ends: npt.NDArray[np.int64]
    """Shape [documents]: where in `ids` each document ends."""


class Engine(Protocol):
    """Anything that turns texts into ids."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of the texts."""


class Encoder:
    """Encodes documents without special tokens; control-token text inside a document stays plain text.

    `engine="auto"` uses gigatoken (byte-level BPE) or tokie (WordPiece) where it is installed and agrees with
    `tokenizers` on adversarial text, now and on a sample of every call; the first difference is reported and ends
    its use. `report` receives that line; without it, it is a warning.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        engine: Literal["auto", "reference"] = "auto",
        report: Callable[[str], None] | None = None,
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
        self._reference = _Reference(content)
        self._fast: Engine | None = None
        self._calls = 0
        self._name = _fast_engine(content)
        if engine == "auto" and self._name and importlib.util.find_spec(self._name):
            self._adopt(content, adversarial_texts(tokenizer))

    @property
    def engine(self) -> str:
        """Name of the engine in use: `gigatoken`, `tokie` or `tokenizers`."""
        return "tokenizers" if self._fast is None or self._name is None else self._name

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode whole documents.

        Raises:
            TokenizerError: a document holds a lone surrogate, which is not text.
        """
        _refuse_surrogates(texts)
        pieces, last = self._cut(texts)
        encoded = self._encode_pieces(pieces)
        return Encoded(encoded.ids, encoded.ends[last])

    def _cut(self, texts: Sequence[str]) -> tuple[list[str], npt.NDArray[np.int64]]:
        pieces: list[str] = []
        last = np.empty(len(texts), dtype=np.int64)
        for i, text in enumerate(texts):
            if self._can_cut and len(text) > 4 * _SAMPLE_CHARS:
                # A short piece somewhere in every long text is what a sample can afford to check.
                place = int((self._calls + i) * 0.7548776662466927 % 1.0 * (len(text) - 2 * _SAMPLE_CHARS))
                for part in cut_out(text, place, _SAMPLE_CHARS):
                    pieces.extend(cut_text(part))
            else:
                pieces.append(text)
            last[i] = len(pieces) - 1
        return pieces, last

    def _encode_pieces(self, pieces: list[str]) -> Encoded:
        if self._fast is None:
            return self._reference.encode(pieces)
        sample = _sample(pieces, self._calls)
        self._calls += 1
        try:
            encoded = self._fast.encode(pieces)
            wrong = _first_difference(encoded, self._reference, pieces, sample)
        except Exception as error:  # a foreign engine may raise anything; the reference stands ready
            self._abandon(f"raised {type(error).__name__}: {error}")
            return self._reference.encode(pieces)
        if wrong is not None:
            self._abandon(f"encoded {_shorten(pieces[wrong])} differently")
            return self._reference.encode(pieces)
        return encoded

    def _adopt(self, content: dict[str, Any], texts: list[str]) -> None:
        try:
            fast = open_gigatoken(content) if self._name == "gigatoken" else open_tokie(content, self._reference)
            wrong = _first_difference(fast.encode(texts), self._reference, texts, range(len(texts)))
        except Exception as error:  # see above
            self._abandon(f"refused this tokenizer: {error}")
            return
        if wrong is not None:
            self._abandon(f"encoded {_shorten(texts[wrong])} differently")
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
    content: dict[str, Any] = json.loads(tokenizer.backend.to_str())
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


class _Reference:
    """`tokenizers`, the reference."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._backend.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> Encoded:
        arrays: list[npt.NDArray[np.uint32]] = []
        for batch in _batches(texts):
            encodings = self._backend.encode_batch_fast(batch, add_special_tokens=False)
            arrays.extend(np.array(encoding.ids, dtype=np.uint32) for encoding in encodings)
        ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        return Encoded(np.concatenate(arrays) if arrays else np.empty(0, np.uint32), ends)


class _Gigatoken:
    """gigatoken; its caches grow with the text, so a fresh instance takes over now and then."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = json.dumps(content)
        self._renew()

    def encode(self, texts: Sequence[str]) -> Encoded:
        if not texts:
            return Encoded(np.empty(0, np.uint32), np.empty(0, np.int64))
        if self._chars > _RECYCLE_CHARS:
            self._renew()
        self._chars += sum(map(len, texts))
        layout = self._backend.encode_batch(list(texts)).layout
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        ids = np.asarray(layout.content.data, dtype=np.uint32)[offsets[0] : offsets[-1]]
        return Encoded(ids, offsets[1:] - offsets[0])

    def _renew(self) -> None:
        import gigatoken

        self._backend = gigatoken.Tokenizer.from_json(self._content)
        self._chars = 0


class _Tokie:
    """tokie, for texts of characters on which it is known to agree; the others go to the reference."""

    def __init__(self, content: dict[str, Any], reference: Engine) -> None:
        import tokie

        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            self._backend: Any = tokie.Tokenizer.from_json(file.name)
        self._reference = reference

    def encode(self, texts: Sequence[str]) -> Encoded:
        odd = [i for i, text in enumerate(texts) if TOKIE_ODD.search(text)]
        plain = list(texts)
        for i in odd:
            plain[i] = ""
        ids, lengths = self._backend.encode_batch_flat(plain, add_special_tokens=False)
        ends = np.cumsum(lengths.astype(np.int64))
        if not odd:
            return Encoded(ids, ends)
        slow = self._reference.encode([texts[i] for i in odd])
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


def open_tokie(content: dict[str, Any], reference: Engine) -> Engine:
    """The fast engine for WordPiece; raises whatever tokie raises where it cannot."""
    return _Tokie(content, reference)


def open_gigatoken(content: dict[str, Any]) -> Engine:
    """The fast engine for a `tokenizer.json`; raises whatever gigatoken raises where it cannot."""
    return _Gigatoken(content)


def _fast_engine(content: dict[str, Any]) -> str | None:
    """Which fast engine serves a `tokenizer.json`; tokie is wrong for BPE on repeated letters, and for Unigram."""
    if content["model"]["type"] == "BPE" and '"ByteLevel"' in json.dumps(content["pre_tokenizer"]):
        return "gigatoken"
    return "tokie" if content["model"]["type"] == "WordPiece" else None


def _merged(pair: str | list[str]) -> str:
    return "".join(pair.split(" ", 1) if isinstance(pair, str) else pair)


def _batches(texts: Sequence[str]) -> list[list[str]]:
    batches: list[list[str]] = []
    room = 0
    for text in texts:
        if room <= 0:
            batches.append([])
            room = _BATCH_CHARS
        batches[-1].append(text)
        room -= len(text)
    return batches


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for i, text in enumerate(texts):
        try:
            if not text.isascii():
                text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"document {i} holds a lone surrogate, U+{ord(text[error.start]):04X}",
                where=f"document {i}, character {error.start}",
                remedy="decode the text with errors='replace', or drop the document",
            ) from error


def _sample(pieces: list[str], salt: int) -> list[int]:
    """A few pieces, about 1/256 of the text, other ones in each call; short ones where there are some."""
    budget = max(_SAMPLE_CHARS, sum(map(len, pieces)) // _SAMPLE_SHARE)
    short = [i for i, piece in enumerate(pieces) if len(piece) <= 4 * _SAMPLE_CHARS]
    among = short or list(range(len(pieces)))
    chosen, count = [], len(among)
    for k in range(count):
        if budget <= 0:
            break
        # Steps of the golden ratio spread the sample over the batch.
        i = among[int((salt * 0.7548776662466927 + k * 0.6180339887498949) % 1.0 * count)]
        chosen.append(i)
        budget -= len(pieces[i]) + 16
    return sorted(set(chosen))


def _first_difference(encoded: Encoded, reference: Engine, texts: Sequence[str], sample: Sequence[int]) -> int | None:
    if len(encoded.ends) != len(texts):
        raise ValueError(f"{len(encoded.ends)} results for {len(texts)} texts")
    expected = reference.encode([texts[i] for i in sample])
    starts = np.concatenate([[0], encoded.ends])
    begin = 0
    for i, end in zip(sample, expected.ends, strict=True):
        if not np.array_equal(encoded.ids[starts[i] : starts[i + 1]], expected.ids[begin:end]):
            return i
        begin = int(end)
    return None


def _shorten(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:60] + "...")


def _warn(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=4)
