"""Which tokens begin a word, where words are the tokenizer's own pre-tokens.

Three kinds of tokenizers show it in three ways. WordPiece marks tokens that continue a word, sentencepiece-like ones
mark those that begin one with `▁`: a table by token. Byte-level ones mark neither: their tokens are joined to the text
they stand for, which goes through the tokenizer's own pre-tokenizer.

Shapes: B sequences, T tokens of a sequence, V tokens of the vocabulary, N tokens in a row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from lmssl.errors import TokenizerError
from lmssl.tokenizer.load import Tokenizer
from lmssl.tokenizer.offsets import byte_level_tokens
from lmssl.tokenizer.split import can_cut

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

_SPACE_MARK = "▁"
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` splits by; as a `Split` of its own it is quicker, because no bytes are mapped to characters."""

_MAX_REMEMBERED, _MAX_REMEMBERED_TOKENS = 1 << 17, 32
"""Entries of about 200 bytes; longer stretches hardly come twice."""


class WordStarts:
    """Says of every token whether a word begins with it; picklable.

    Special tokens are words of their own, and so are ordinary added ones. Where a segment is a part of a document, the
    words at its ends may come out otherwise than in the whole document, because not all of their text is there.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        content = json.loads(tokenizer.backend.to_str())
        # The unknown token stands for text inside a word; only the model makes it.
        alone = [token["id"] for token in content["added_tokens"] if token["id"] != tokenizer.unk_id]
        self._alone_V = np.zeros(tokenizer.num_tokens, bool)
        self._alone_V[alone] = True
        self._begins_V: BoolArray | None = None
        self._ends_V: BoolArray | None = None
        self._text: _TextWords | None = None
        names = [""] * tokenizer.num_tokens
        for name, token in tokenizer.backend.get_vocab(with_added_tokens=True).items():
            names[token] = name
        model, stages = content["model"], _stages(content.get("pre_tokenizer"))
        kinds = {stage["type"] for stage in stages}
        prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
        if model["type"] == "WordLevel":
            self._begins_V = np.ones(len(names), bool)
        elif prefix:
            self._begins_V = np.array([not name.startswith(prefix) for name in names])
        elif suffix:
            self._ends_V = np.array([name.endswith(suffix) for name in names])
        elif "ByteLevel" in kinds:
            self._text = _TextWords(_token_bytes(content, names), stages, tokenizer)
        elif '"ByteLevel"' in json.dumps(content.get("normalizer")):
            self._text = _TextWords([name.encode() for name in names], stages, tokenizer)
        elif _is_marked(stages) and any(name.startswith(_SPACE_MARK) for name in names):
            self._begins_V = np.array([name.startswith(_SPACE_MARK) for name in names])
        elif "Metaspace" in kinds:
            self._text = _TextWords(_surfaces(names, tokenizer.unk_id), stages, tokenizer)
        else:
            raise _wordless(tokenizer)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> WordStarts:
        """The words of a tokenizer.

        Raises:
            TokenizerError: it does not split text into words, or its tokens do not show where.
        """
        return cls(tokenizer)

    def starts(self, ids_BT: IntArray, segments_BT: npt.NDArray[np.int32]) -> BoolArray:
        """The first token of every word; shape [B, T]. Padding, segment 0, holds none.

        A segment starts a word, too.
        """
        alone_BT = self._alone_V[ids_BT]
        starts_BT = np.ones(ids_BT.shape, bool)
        starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
        starts_BT |= alone_BT
        starts_BT[:, 1:] |= alone_BT[:, :-1]
        if self._begins_V is not None:
            starts_BT |= self._begins_V[ids_BT]
        if self._ends_V is not None:
            starts_BT[:, 1:] |= self._ends_V[ids_BT[:, :-1]]
        text_BT = segments_BT != 0
        if self._text is not None:
            starts_BT |= self._text.starts(ids_BT.ravel(), (starts_BT | ~text_BT).ravel()).reshape(ids_BT.shape)
        starts_BT &= text_BT
        return starts_BT


class _TextWords:
    """Joins tokens to text and splits it by a pre-tokenizer.

    The patterns that `can_cut` knows split before any space that follows a sign, letter or digit, before any other
    ASCII character that follows an ASCII letter or digit and is none itself, and look at nothing beyond. There the
    text is cut: most of what lies between is one token, and the rest comes again and again, so that what was found
    out about it is remembered.
    """

    def __init__(self, bytes_V: Sequence[bytes], stages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> None:
        self._bytes_V = list(bytes_V)
        self._sizes_V = np.array([len(raw) for raw in self._bytes_V], dtype=np.int64)
        kept = [plain for stage in stages if (plain := _plain_stage(stage)) is not None]
        if not kept:
            raise _wordless(tokenizer)
        self._pre_tokenizer = _pre_tokenizer(kept)
        self._can_cut = can_cut({"pre_tokenizer": stages[0] if len(stages) == 1 else _sequence(stages)})
        self._opens_by_space_V = np.array([raw[:1] == b" " for raw in self._bytes_V])
        self._solid_V = np.array([_ends_solid(raw) for raw in self._bytes_V])
        self._opens_by_sign_V = np.array([raw[:1].isascii() and not raw[:1].isalnum() for raw in self._bytes_V])
        self._alnum_V = np.array([raw[-1:].isalnum() for raw in self._bytes_V])
        self._remembered: dict[bytes, bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_remembered": {}}

    def starts(self, ids_N: IntArray, starts_N: BoolArray) -> BoolArray:
        """Where words start, given where stretches of text do; shape [N]. The first token starts one."""
        found_N = starts_N.copy()
        if self._can_cut:
            found_N[1:] |= self._opens_by_space_V[ids_N[1:]] & self._solid_V[ids_N[:-1]]
            found_N[1:] |= self._opens_by_sign_V[ids_N[1:]] & self._alnum_V[ids_N[:-1]]
        firsts = np.flatnonzero(found_N)
        stops = np.append(firsts[1:], len(ids_N))
        several = stops - firsts > 1
        firsts, stops = firsts[several], stops[several]
        if not len(firsts):
            return found_N
        raw = ids_N.astype(np.uint32).tobytes()
        keys = [raw[a:b] for a, b in zip((4 * firsts).tolist(), (4 * stops).tolist(), strict=True)]
        marks = [self._remembered.get(key) or self._look(key) for key in keys]
        sizes = stops - firsts
        before = np.cumsum(sizes) - sizes
        found_N[np.arange(sizes.sum()) + np.repeat(firsts - before, sizes)] = np.frombuffer(b"".join(marks), bool)
        return found_N

    def _look(self, key: bytes) -> bytes:
        ids_N = np.frombuffer(key, np.uint32)
        tokens = [self._bytes_V[token] for token in ids_N.tolist()]
        raw = b"".join(tokens)
        if raw.isascii() and len(tokens) <= _MAX_REMEMBERED_TOKENS:  # most are short, and NumPy takes longer to start
            bounds = {stop for _, (_, stop) in self._pre_tokenizer.pre_tokenize_str(raw.decode())}
            befores = accumulate(map(len, tokens[:-1]))
            found = b"\1" + bytes([before in bounds for before in befores])
        else:
            sizes_N = self._sizes_V[ids_N]
            marks_N = np.isin(np.cumsum(sizes_N) - sizes_N, self._word_bounds(raw))
            marks_N[0] = True
            found = marks_N.tobytes()
        if len(tokens) <= _MAX_REMEMBERED_TOKENS:
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = found
        return found

    def _word_bounds(self, raw: bytes) -> IntArray:
        """The bytes at which words of a text begin, without the first word's."""
        text = raw.decode("utf-8", errors="surrogateescape")
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")
        if len(codes) == len(raw):
            sizes = None
        else:
            sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
        broken = (codes >= 0xD800) & (codes < 0xE000)
        if broken.any():
            text = _whole(text)
            if sizes is not None:
                sizes[broken] = 1
        # White space between two words that the pre-tokenizer drops belongs to the second.
        pieces = self._pre_tokenizer.pre_tokenize_str(text)
        bounds = np.array([stop for _, (_, stop) in pieces[:-1]], dtype=np.int64)
        return bounds if sizes is None else np.cumsum(sizes)[bounds - 1]


def _stages(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [stage for part in pre_tokenizer["pretokenizers"] for stage in _stages(part)]
    return [pre_tokenizer]


def _is_marked(stages: Sequence[dict[str, Any]]) -> bool:
    """Whether all words but a text's first begin with the mark of a space."""
    if all(stage["type"] in ("Metaspace", "WhitespaceSplit") for stage in stages):
        return True
    last = stages[-1]
    return last["type"] == "Metaspace" and last["prepend_scheme"] == "always" and bool(last.get("split", True))


def _plain_stage(stage: dict[str, Any]) -> dict[str, Any] | None:
    """The same split for text that has been tokenized before; None: it splits nothing."""
    if stage["type"] == "ByteLevel":
        if not stage["use_regex"]:
            return None
        return {"type": "Split", "pattern": {"Regex": _GPT2_SPLIT}, "behavior": "Isolated", "invert": False}
    return None if stage["type"] == "Metaspace" and not stage.get("split", True) else stage


def _sequence(stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(stages)}


def _pre_tokenizer(stages: Sequence[dict[str, Any]]) -> Any:
    content = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    content["pre_tokenizer"] = _sequence(stages) if len(stages) > 1 else stages[0]
    return tokenizers.Tokenizer.from_str(json.dumps(content)).pre_tokenizer


def _token_bytes(content: dict[str, Any], names: Sequence[str]) -> list[bytes]:
    found = byte_level_tokens(content) or {}
    return [found.get(token, b"") for token in range(len(names))]


def _surfaces(names: Sequence[str], unk_id: int | None) -> list[bytes]:
    """The text of sentencepiece-like tokens; `<0xE2>` is a byte, and the unknown token some letter."""
    found = []
    for token, name in enumerate(names):
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            found.append(bytes.fromhex(name[3:5]))
        else:
            found.append(b"x" if token == unk_id else name.encode())
    return found


def _ends_solid(raw: bytes) -> bool:
    """Whether the last character is all there, and a letter, a digit or ASCII punctuation."""
    for size in range(1, min(4, len(raw)) + 1):
        try:
            last = raw[-size:].decode()
        except UnicodeDecodeError:
            continue
        return last.isalnum() or (last.isascii() and last.isprintable() and last != " ")
    return False


def _whole(text: str) -> str:
    """The text with a character in place of each byte that belongs to a cut one: of the kind it most likely was.

    What stood in a cut character tells whether the word goes on there: with a letter it does, with a sign it does not.
    """
    found, kind = [], "a"
    for character in text:
        byte = ord(character) - 0xDC00
        if not 0x80 <= byte <= 0xFF:
            found.append(character)
            kind = "a"
            continue
        if byte in (0xE2, 0xEF, 0xF0):  # arrows and dashes, full-width signs, emoji
            kind = "\N{WHITE STAR}"
        elif byte >= 0xC0:
            kind = "a"
        found.append(kind)
    return "".join(found)


def _wordless(tokenizer: Tokenizer) -> TokenizerError:
    return TokenizerError(
        "the tokenizer's tokens do not show where words begin",
        where=str(tokenizer.path),
        remedy="set objective.strategy: token or span, or use a WordPiece, byte-level or sentencepiece-like tokenizer "
        "that splits text into words",
    )
