"""What an objective asks of a tokenizer; without torch, so that `lmssl prepare` asks before it works for hours."""

from __future__ import annotations

from typing import NamedTuple

from lmssl.errors import TokenizerError
from lmssl.recipe.objective import AnyObjective, Masks, SpanObjective
from lmssl.tokenizer.load import Tokenizer
from lmssl.tokenizer.words import WordStarts


class SpanIds(NamedTuple):
    """Control tokens of span corruption."""

    sentinels: tuple[int, ...]
    """Of `<extra_id_0>`, `<extra_id_1>` and so on."""
    eos: int
    pad: int


def check_tokenizer(objective: AnyObjective, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that lacks what the objective puts into text.

    Raises:
        TokenizerError: names what is missing.
    """
    if isinstance(objective, SpanObjective):
        span_ids(tokenizer)
    if isinstance(objective, Masks):
        mask_id(tokenizer)
        if objective.strategy == "whole_word":
            WordStarts.of(tokenizer)


def mask_id(tokenizer: Tokenizer) -> int:
    """The id of the mask token.

    Raises:
        TokenizerError: there is none.
    """
    if tokenizer.mask_id is None:
        raise TokenizerError(
            "the objective hides tokens, and the tokenizer has no mask token",
            where=str(tokenizer.path),
            remedy="use a tokenizer whose config names a mask_token, or train one with objective: masked",
        )
    return tokenizer.mask_id


def span_ids(tokenizer: Tokenizer) -> SpanIds:
    """The ids of the sentinels, of eos and of pad.

    Raises:
        TokenizerError: the tokenizer lacks sentinels, or an eos or pad token.
    """
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    sentinels: list[int] = []
    while (token := vocabulary.get(f"<extra_id_{len(sentinels)}>")) is not None:
        sentinels.append(token)
    missing = [name for name, token in (("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id)) if token is None]
    if not sentinels or tokenizer.eos_id is None or tokenizer.pad_id is None:
        what = "sentinels <extra_id_0>, <extra_id_1>, ..." if not sentinels else f"{missing[0]} token"
        raise TokenizerError(
            f"span corruption needs {what}, and the tokenizer has none",
            where=str(tokenizer.path),
            remedy="use a tokenizer with them, such as tokenizer/t5-8k, or build one with objective: span",
        )
    return SpanIds(tuple(sentinels), tokenizer.eos_id, tokenizer.pad_id)
