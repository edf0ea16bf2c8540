"""Where in a text each token stands, in bytes: for tracing, so by the reference engine alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers

from lmssl.tokenizer.encode import plain_content
from lmssl.tokenizer.load import Tokenizer
from lmssl.tokenizer.split import PIECE_BYTES, can_cut, cut_text

IntArray = npt.NDArray[np.int64]


class TokenBytes(NamedTuple):
    """The tokens of a text; token i stands for bytes `bounds[i]` to `bounds[i + 1]` of its UTF-8."""

    ids: IntArray
    """Shape [tokens]."""
    bounds: IntArray
    """Shape [tokens + 1]; from 0 to the number of bytes, never falling."""


class TokenOffsets:
    """Encodes documents as `Encoder` does, and says which bytes each token stands for.

    The tokens of a text tile it. Byte-level tokens are measured exactly, also where several share one character; of
    other tokenizers a token begins at a character, and white space that no token covers goes with the token before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        content = plain_content(tokenizer)
        self._can_cut = can_cut(content)
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        self._backend.encode_special_tokens = True
        self._bytes_of = byte_level_tokens(content)

    def encode(self, text: str) -> TokenBytes:
        """The tokens of one document, without special tokens."""
        ids, bounds, num_bytes = [], [], 0
        raw = text.encode()
        for piece in cut_text(raw, PIECE_BYTES) if self._can_cut else [raw]:
            encoded = self._encode_piece(piece)
            ids.append(encoded.ids)
            bounds.append(num_bytes + encoded.bounds[:-1])
            num_bytes += int(encoded.bounds[-1])
        return TokenBytes(np.concatenate(ids), np.concatenate([*bounds, [num_bytes]]))

    def _encode_piece(self, raw: bytes) -> TokenBytes:
        text = raw.decode()
        if self._bytes_of is not None:
            (fast,) = self._backend.encode_batch_fast([text], add_special_tokens=False)  # without offsets
            exact = _exact_bounds([self._bytes_of.get(token, b"") for token in fast.ids], raw)
            if exact is not None:
                return TokenBytes(np.array(fast.ids, dtype=np.int64), exact)
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int64)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        # A normaliser may make several tokens of one character; these share its place, and the last has its bytes.
        bounds = np.maximum.accumulate(np.append(_byte_starts(text)[starts], len(raw)))
        if len(ids):
            bounds[0] = 0
        return TokenBytes(ids, bounds)


def surface_bytes(tokenizer: Tokenizer) -> IntArray:
    """Bytes of the text that each id stands for, shape [num_tokens]; 0 for control tokens.

    Exact for byte-level tokenizers; of others the vocabulary's spelling is measured, without marks such as `##`.
    """
    content = json.loads(tokenizer.backend.to_str())
    control = {token["id"] for token in content["added_tokens"] if token["special"]}
    known = byte_level_tokens(content)
    prefix = content["model"].get("continuing_subword_prefix") or ""
    found = np.zeros(tokenizer.num_tokens, dtype=np.int64)
    for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if i in control:
            continue
        if known is not None:
            found[i] = len(known.get(i, b""))
        else:
            plain = token.removeprefix(prefix) if token != prefix else token
            found[i] = len(plain.replace("\u2581", " ").encode())
    return found


def _exact_bounds(tokens: Sequence[bytes], raw: bytes) -> IntArray | None:
    """Bounds of byte-level tokens; None where a normaliser changed the text, so that they are not its bytes."""
    joined = b"".join(tokens)
    prefix = int(joined == b" " + raw)  # the pre-tokenizer may put a space before the text
    if not prefix and joined != raw:
        return None
    bounds = np.cumsum([0, *(len(token) for token in tokens)], dtype=np.int64)
    return np.maximum(bounds - prefix, 0)


def _byte_starts(text: str) -> IntArray:
    """Byte at which each character begins, and the number of bytes; shape [characters + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def byte_level_tokens(content: dict[str, Any]) -> dict[int, bytes] | None:
    """The bytes of each token of a byte-level tokenizer by id; None for any other."""
    stages = json.dumps([content.get("pre_tokenizer"), content.get("normalizer")])
    vocabulary = content["model"]["vocab"]
    if '"ByteLevel"' not in stages or not isinstance(vocabulary, dict):
        return None
    alphabet = _byte_of_character()
    found = {}
    for token, i in vocabulary.items():
        values = [alphabet.get(character) for character in token]
        if None not in values:
            found[i] = bytes(value for value in values if value is not None)
    for token in content["added_tokens"]:
        if not token["special"]:
            found[token["id"]] = token["content"].encode()
    return found


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level vocabularies: printable bytes stand for themselves, others for U+0100 onward.

    Source: GPT-2's `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + rank): byte for rank, byte in enumerate(others)},
    }
