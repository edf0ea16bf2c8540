"""What a model writes: continuations, filled masks, filled gaps, for a quick look."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmssl.errors import EvaluationError
from lmssl.evaluate.reader import Reader
from lmssl.evaluate.subject import Subject
from lmssl.tokenizer.load import Tokenizer

_SENTINEL = re.compile(r"<extra_id_\d+>")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that have so much probability together."""
    seed: int = 0


def write(subject: Subject, prompt: str, sampling: Sampling) -> str:
    """The prompt continued, or with its masks or sentinels filled; `subject` gets transformers' own attention.

    Raises:
        EvaluationError: the model writes nothing, the prompt is too long, or has nothing to fill.
    """
    subject = subject.with_stock_attention()
    if subject.kind == "causal":
        return _continue(subject, prompt, sampling)
    if subject.kind == "masked":
        filled = fill_masks(subject, prompt, top_k=1)
        return _replace(subject, prompt, [candidates[0][0] for candidates in filled])
    if subject.kind == "span":
        return _fill_sentinels(subject, prompt, sampling)
    raise EvaluationError(
        f"{subject.what} writes no text", where=str(subject.path), remedy="use a causal, masked or T5 model"
    )


def look(subject: Subject, prompt: str, sampling: Sampling, *, top_k: int) -> str:
    """What `lmssl generate` prints: a text, or for a masked model the likeliest tokens of each mask.

    Raises:
        EvaluationError: see `write` and `fill_masks`.
    """
    if subject.kind != "masked":
        return write(subject, prompt, sampling)
    blocks = [
        "\n".join(f"{share:7.2%}  {token}" for token, share in candidates)
        for candidates in fill_masks(subject, prompt, top_k=top_k)
    ]
    return "\n\n".join(blocks)


def fill_masks(subject: Subject, prompt: str, *, top_k: int) -> list[list[tuple[str, float]]]:
    """The likeliest tokens in each mask's place, each with its probability.

    Every mask is filled for itself, with the others in place. `[MASK]` and `<mask>` are read as the tokenizer's own.

    Raises:
        EvaluationError: the prompt has no mask or is too long.
    """
    subject = subject.with_stock_attention()
    mask_id = subject.reader.mask_id
    ids = subject.tokenizer.backend.encode(own_masks(subject.reader, prompt)).ids
    check_length(subject.reader, len(ids))
    places = [place for place, token in enumerate(ids) if token == mask_id]
    if not places:
        raise EvaluationError(
            "the prompt has no mask to fill",
            where=repr(prompt[:60]),
            remedy=f'write one where a word is missing: "Paris is the {_mask(subject.reader)} of France."',
        )
    with torch.no_grad():
        output = subject.model(input_ids=_row(subject, ids))
        # The other name is that of a model with a second task.
        whole: Tensor = output["logits" if "logits" in output else "prediction_logits"]
        logits = whole[0, places, : subject.tokenizer.num_tokens]
    found = logits.float().softmax(-1).topk(min(top_k, logits.shape[-1]))
    decode = subject.tokenizer.backend.decode
    return [
        [(decode([token], skip_special_tokens=False), share) for token, share in zip(tokens, shares, strict=True)]
        for tokens, shares in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]


def _continue(subject: Subject, prompt: str, sampling: Sampling) -> str:
    reader = subject.reader
    before, _ = reader.around("auto", where="the prompt")
    given = reader.encode([prompt])[0].tolist()
    check_length(reader, len(before) + len(given) + 1)
    longest = reader.longest_tokens
    room = sampling.max_new_tokens if longest is None else longest - len(before) - len(given)
    ids = [*before, *given]
    if not ids:
        raise EvaluationError("the prompt is empty", where="PROMPT", remedy="give a text to continue")
    written = _generate(subject, ids, sampling, min(room, sampling.max_new_tokens))[len(ids) :]
    return prompt + decoded_behind(subject.tokenizer, given, written)


def decoded_behind(tokenizer: Tokenizer, given: list[int], written: list[int]) -> str:
    """What new tokens add to the text of those given; a token by itself may lose its space."""
    decode = tokenizer.backend.decode
    whole, start = decode([*given, *written]), decode(given)
    return str(whole[len(start) :] if whole.startswith(start) else decode(written))


def _fill_sentinels(subject: Subject, prompt: str, sampling: Sampling) -> str:
    ids = ids_with_sentinels(subject.tokenizer, prompt)
    return sentinels_filled(subject.tokenizer, prompt, _generate(subject, ids, sampling, sampling.max_new_tokens))


def ids_with_sentinels(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """What T5's encoder reads of a prompt.

    Raises:
        EvaluationError: it has no sentinel.
    """
    if not _SENTINEL.search(prompt):
        raise EvaluationError(
            "the prompt has no sentinel to fill",
            where=repr(prompt[:60]),
            remedy='write one where text is missing: "Paris is <extra_id_0> of France."',
        )
    ids: list[int] = tokenizer.backend.encode(prompt).ids
    return ids


def sentinels_filled(tokenizer: Tokenizer, prompt: str, written: list[int]) -> str:
    """The prompt with what the decoder wrote in place of its sentinels; those it did not write stay."""
    text = tokenizer.backend.decode(written, skip_special_tokens=False)
    pieces = _SENTINEL.split(text)[1:]
    fills = dict(zip(_SENTINEL.findall(text), pieces, strict=True))
    eos = tokenizer.eos_id
    end = tokenizer.backend.id_to_token(eos) if eos is not None else None
    found = {name: (fill.split(end)[0] if end else fill).strip() for name, fill in fills.items()}
    return _SENTINEL.sub(lambda match: found.get(match[0], match[0]), prompt)


def _generate(subject: Subject, ids: list[int], sampling: Sampling, max_new_tokens: int) -> list[int]:
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    tokenizer = subject.tokenizer
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.end_id
    row = _row(subject, ids)
    model: Any = subject.model
    devices = [row.device.index or 0] if row.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(sampling.seed)
        found = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=max_new_tokens,
            do_sample=bool(drawn),
            eos_token_id=tokenizer.end_id,
            pad_token_id=pad,
            **drawn,
        )
    ids_out: list[int] = found[0].tolist()
    return ids_out


def _row(subject: Subject, ids: list[int]) -> Tensor:
    return torch.tensor([ids], device=subject.model.device)


def check_length(reader: Reader, num_tokens: int) -> None:
    """Refuse a prompt that the model cannot read.

    Raises:
        EvaluationError: it is too long.
    """
    longest = reader.longest_tokens
    if longest is not None and num_tokens > longest:
        raise EvaluationError(
            f"the prompt takes {num_tokens} tokens, and {reader.what} reads at most {longest}",
            where="PROMPT",
            remedy="shorten it",
        )


def _mask(reader: Reader) -> str:
    return str(reader.tokenizer.backend.id_to_token(reader.mask_id))


def own_masks(reader: Reader, prompt: str) -> str:
    """A prompt with the tokenizer's own mask token for `[MASK]` and `<mask>`."""
    return prompt.replace("[MASK]", _mask(reader)).replace("<mask>", _mask(reader))


def _replace(subject: Subject, prompt: str, fills: list[str]) -> str:
    pieces = own_masks(subject.reader, prompt).split(_mask(subject.reader))
    joined = [piece + fill.strip() for piece, fill in zip(pieces, [*fills, ""], strict=True)]
    return "".join(joined)
