"""Texts that a model writes while it trains: every rank takes part in every forward, as divided weights need it.

Each forward reads the whole text again. A cache of keys and values would be quicker, and needs an attention of its own;
a few short texts cost less than one evaluation either way.

Shapes: B texts, T tokens of the longest, C places of the text that has most, N = B * C, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmssl.data.validation import ValidationSplit
from lmssl.errors import EvaluationError, TokenizerError
from lmssl.evaluate.generate import (
    Sampling,
    check_length,
    decoded_behind,
    ids_with_sentinels,
    own_masks,
    sentinels_filled,
)
from lmssl.evaluate.reader import Reader
from lmssl.evaluate.score import IntArray, Row, logits_of, row_tensors
from lmssl.model.electra import ElectraPair
from lmssl.model.encoder import encode_decode
from lmssl.model.head import output_weight
from lmssl.objective.masked import at_targets
from lmssl.tokenizer.load import Tokenizer
from lmssl.tokenizer.words import WordStarts

Kind = Literal["causal", "masked", "span"]
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("causal", "prefix", "hybrid"), "causal"),
    **dict.fromkeys(("masked", "replaced"), "masked"),
    "span": "span",
}
"""What the models of an objective do with a text: continue it, fill its masks, or fill its sentinels."""

_BEGINNING_TOKENS = 16
"""Of a held-out document that is continued."""
_HIDDEN_WORD = 6
"""Of a held-out document every so many-th word is hidden, about a share of 0.15."""
_SPAN_TOKENS = 3
"""Hidden of a held-out document behind T5's first sentinel: the mean of its training."""

_NO_PLACES: IntArray = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Blank:
    """A text that is to be continued or filled."""

    prompt: str
    """In words."""
    ids: IntArray
    """What the model reads of it; with T5 the encoder."""
    places: IntArray = field(default_factory=lambda: _NO_PLACES)
    """Of the masks."""
    original: str | None = None
    """What was there; None: nobody knows."""


def prompted(kind: Kind, reader: Reader, prompt: str) -> Blank:
    """A prompt as the model reads it.

    Raises:
        EvaluationError: it is too long, or has nothing to fill.
    """
    tokenizer = reader.tokenizer
    if kind == "causal":
        before, _ = reader.around("auto", where="evaluate.samples")
        ids = np.concatenate([np.array(before, np.int64), reader.encode([prompt])[0]])
        check_length(reader, len(ids) + 1)
        return Blank(prompt, ids)
    if kind == "span":
        return Blank(prompt, np.array(ids_with_sentinels(tokenizer, prompt), np.int64))
    ids = np.array(tokenizer.backend.encode(own_masks(reader, prompt)).ids, np.int64)
    check_length(reader, len(ids))
    places = np.flatnonzero(ids == reader.mask_id)
    if not len(places):
        raise EvaluationError(
            "the prompt has no mask to fill", where=repr(prompt[:60]), remedy="write [MASK] where a word is missing"
        )
    return Blank(prompt, ids, places)


def held_out(
    kind: Kind, reader: Reader, splits: Sequence[ValidationSplit], *, count: int, num_tokens: int
) -> list[Blank]:
    """Held-out text to continue or to fill: the longest segment of the first sequence, of the second, and so on.

    Args:
        num_tokens: of what is filled; of what is continued there are 16.
    """
    found = []
    for index in range(count):
        split, number = splits[index % len(splits)], index // len(splits)
        if number < split.num_sequences:
            row = split.sequence(number)
            longest = int(np.bincount(row.segments_T)[1:].argmax()) + 1
            found.append(_blank_of(kind, reader, row.ids_T[row.segments_T == longest].astype(np.int64), num_tokens))
    return found


def _blank_of(kind: Kind, reader: Reader, ids: IntArray, num_tokens: int) -> Blank:
    tokenizer = reader.tokenizer
    if kind == "causal":
        ids = ids[: min(_BEGINNING_TOKENS, max(1, len(ids) // 2))]
        return Blank(_decoded(tokenizer, ids), ids)
    if kind == "span":
        ids = ids[:num_tokens]
        first = len(ids) // 2
        hidden = slice(first, first + _SPAN_TOKENS)
        before, after = (_decoded(tokenizer, part) for part in (ids[:first], ids[hidden.stop :]))
        sentinel = tokenizer.backend.token_to_id("<extra_id_0>")
        read = np.concatenate([ids[:first], [sentinel], ids[hidden.stop :], [tokenizer.eos_id]])
        prompt = f"{before.rstrip()} <extra_id_0> {after.lstrip()}"
        return Blank(prompt, read.astype(np.int64), original=_decoded(tokenizer, ids[hidden]).strip())
    ends = len(ids) > num_tokens and ids[-1] == tokenizer.sep_id
    ids = np.append(ids[: num_tokens - 1], ids[-1]) if ends else ids[:num_tokens]
    places = _hidden_words(tokenizer, ids)
    masked = ids.copy()
    masked[places] = reader.mask_id
    control = [token for token in (tokenizer.cls_id, tokenizer.sep_id) if token is not None]
    shown = tokenizer.decode(masked[~np.isin(masked, control)].tolist())
    return Blank(shown, masked, places, _decoded(tokenizer, ids))


def _hidden_words(tokenizer: Tokenizer, ids: IntArray) -> IntArray:
    """Places of every sixth word that is text, from the fourth on; of a text too short for that, of its last.

    Of a tokenizer that does not show words every token is taken for one.
    """
    roles = ("bos", "eos", "pad", "cls", "sep", "mask", "unk")
    control = [token for role in roles if (token := getattr(tokenizer, f"{role}_id")) is not None]
    text = ~np.isin(ids, control)
    starts = text
    with suppress(TokenizerError):
        starts = text & WordStarts.of(tokenizer).starts(ids[None], np.ones((1, len(ids)), np.int32))[0]
    number = np.cumsum(starts)
    hidden = text & (number % _HIDDEN_WORD == 4) if number[-1] >= 4 else text & (number == number[-1])
    return np.flatnonzero(hidden)


def write_samples(
    module: nn.Module,
    kind: Kind,
    blanks: Sequence[Blank],
    reader: Reader,
    accelerator: Accelerator,
    *,
    sampling: Sampling,
    go_on: Callable[[], bool] = lambda: True,
) -> list[dict[str, str]] | None:
    """Each text continued or filled, as rows of `prompt`, `text` and, where it is known, `original`.

    Every process must call with the same texts. They make equally many forwards; the texts of the first one count.

    Args:
        module: a `LossModule`, or what wraps one; it is left in the mode it came in.
        sampling: its seed and a text's number key the draws.
        go_on: asked before each forward, and must answer the same on every rank; after a no the result is None.
    """
    was_training = module.training
    module.eval()
    writer = _Writer(module, kind, reader, accelerator, sampling, go_on)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            texts = writer.filled(blanks) if kind == "masked" else writer.written(blanks)
    finally:
        module.train(was_training)
    if texts is None:
        return None
    return [
        {"prompt": blank.prompt, "text": text} | ({} if blank.original is None else {"original": blank.original})
        for blank, text in zip(blanks, texts, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Writer:
    module: nn.Module
    kind: Kind
    reader: Reader
    accelerator: Accelerator
    sampling: Sampling
    go_on: Callable[[], bool]

    def filled(self, blanks: Sequence[Blank]) -> list[str] | None:
        """Every mask for itself, with the others in place: one forward."""
        if not self.go_on():
            return None
        rows = [Row(blank.ids, blank.places, np.zeros_like(blank.places)) for blank in blanks]
        inputs = row_tensors(rows, self.reader.tokenizer.pad_id or 0)
        logits_NV = self._logits(inputs, _at_masks)
        found, width = [], inputs["places_BC"].shape[1]
        for index, blank in enumerate(blanks):
            draws, ids = self._draws(index), blank.ids.copy()
            for number, place in enumerate(blank.places.tolist()):
                ids[place] = self._chosen(logits_NV[index * width + number], draws)
            found.append(_decoded(self.reader.tokenizer, ids))
        return found

    def written(self, blanks: Sequence[Blank]) -> list[str] | None:
        """Token by token, all texts together, until each has ended or is long enough."""
        tokenizer, limit = self.reader.tokenizer, self.sampling.max_new_tokens
        draws = [self._draws(index) for index in range(len(blanks))]
        new: list[list[int]] = [[] for _ in blanks]
        longest = None if self.kind == "span" else self.reader.longest_tokens
        rooms = [limit if longest is None else min(limit, longest - len(blank.ids)) for blank in blanks]
        open_rows = set(range(len(blanks)))
        for number in range(limit):
            if not self.go_on():
                return None
            # Processes whose numbers differ in the last bits may end texts elsewhere, and must make as many forwards.
            if not open_rows and self.accelerator.num_processes == 1:
                break
            logits_BV = self._next_logits(blanks, new)
            for index in sorted(open_rows):
                token = self._chosen(logits_BV[index], draws[index])
                if token == tokenizer.end_id:
                    open_rows.discard(index)
                    continue
                new[index].append(token)
                if number + 1 >= rooms[index]:
                    open_rows.discard(index)
        if self.kind == "span":
            return [sentinels_filled(tokenizer, blank.prompt, ids) for blank, ids in zip(blanks, new, strict=True)]
        return [
            blank.prompt + decoded_behind(tokenizer, blank.ids.tolist(), ids)
            for blank, ids in zip(blanks, new, strict=True)
        ]

    def _next_logits(self, blanks: Sequence[Blank], new: Sequence[list[int]]) -> Tensor:
        pad = self.reader.tokenizer.pad_id or 0
        if self.kind == "causal":
            return self._logits(
                _ending([np.append(b.ids, ids) for b, ids in zip(blanks, new, strict=True)], pad), _next
            )
        inputs = _ending([np.array([pad, *ids]) for ids in new], pad)
        read = row_tensors([Row(blank.ids, _NO_PLACES, _NO_PLACES) for blank in blanks], pad)
        return self._logits(inputs | {"ids_BE": read["ids_BT"], "segments_BE": read["segments_BT"]}, _next_of_decoder)

    def _logits(self, inputs: dict[str, Tensor], function: Callable[..., dict[str, Tensor]]) -> Tensor:
        """Of the tokens that the tokenizer knows, float32 on CPU, a row a place."""
        moved = {name: tensor.to(self.accelerator.device) for name, tensor in inputs.items()}
        found: Tensor = self.module(moved, function)["logits_NV"]
        return found[:, : self.reader.tokenizer.num_tokens].float().cpu()

    def _draws(self, index: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.sampling.seed * 1_000_003 + index) % 2**63)

    def _chosen(self, logits_V: Tensor, draws: torch.Generator) -> int:
        if not self.sampling.temperature:
            return int(logits_V.argmax())
        shares_V, order_V = (logits_V / self.sampling.temperature).softmax(-1).sort(descending=True, stable=True)
        # The likeliest that reach top_p together: those before which less was reached.
        shares_V = shares_V * (shares_V.cumsum(-1) - shares_V < self.sampling.top_p)
        return int(order_V[torch.multinomial(shares_V, 1, generator=draws)])


def _ending(texts: Sequence[IntArray], pad: int) -> dict[str, Tensor]:
    """Rows of which the token behind the last is wanted."""
    return row_tensors([Row(ids, np.array([len(ids) - 1]), np.zeros(1, np.int64)) for ids in texts], pad)


def _next(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    logits, states_ND, _ = logits_of(model, inputs, inputs["places_BC"], causal=True)
    return {"logits_NV": logits(states_ND)}


def _at_masks(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    stock = model.generator if isinstance(model, ElectraPair) else model
    logits, states_ND, _ = logits_of(stock, inputs, inputs["places_BC"], causal=False)
    return {"logits_NV": logits(states_ND)}


def _next_of_decoder(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    read = (inputs[name] for name in ("ids_BE", "segments_BE", "ids_BT", "segments_BT"))
    states_ND = at_targets(encode_decode(model, *read), inputs["places_BC"])
    return {"logits_NV": (states_ND @ output_weight(model).to(states_ND.dtype).t()).float()}


def _decoded(tokenizer: Tokenizer, ids: IntArray) -> str:
    return str(tokenizer.backend.decode(ids.tolist()))


def samples_row(samples: Sequence[dict[str, str]], settings: dict[str, Any], *, step: int, time: str) -> dict[str, Any]:
    """A line of `evaluations.jsonl`, as `lmssl eval` writes it of a suite's samples."""
    row: dict[str, Any] = {"kind": "samples", "name": "samples", "step": step, "metrics": {}}
    return row | {"samples": list(samples), "settings": settings, "time": time}
