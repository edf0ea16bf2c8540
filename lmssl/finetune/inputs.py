"""Examples to token ids and labels, for models that read both ways and for those that read forward only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmssl.errors import DataError
from lmssl.finetune.rows import Example
from lmssl.finetune.start import Start
from lmssl.finetune.task import Classification, Instructions, Tokens

IGNORE = -100
"""Stands where a token has no label; transformers' own number."""


@dataclass(frozen=True)
class Encoded:
    """A split as the Trainer takes it."""

    rows: list[dict[str, Any]]
    """One per example, with `labels`."""
    num_cut: int
    """Examples longer than the model reads or the task allows; they are cut."""
    word_places: list[list[int | None]] | None = None
    """Of tagged words: the index of the token that carries each word's tag; None for a word that was cut off."""


def encode(
    examples: Sequence[Example], asked: Any, start: Start, *, labels: tuple[str, ...], max_tokens: int | None
) -> Encoded:
    """Token ids and labels of a split.

    Args:
        asked: the task's section.
        labels: names in the order of the model's outputs.
        max_tokens: the longest row; None is no limit.
    Raises:
        DataError: messages without a chat template, or a conversation that the template does not continue.
    """
    if isinstance(asked, Tokens):
        return _encode_words(examples, start, labels, max_tokens)
    if isinstance(asked, Instructions):
        return _encode_answers(examples, asked, start, max_tokens)
    ids = {label: index for index, label in enumerate(labels)}
    rows, num_cut = _encode_texts(examples, start.tokenizer, max_tokens)
    for row, example in zip(rows, examples, strict=True):
        row["labels"] = ids[example.answer] if isinstance(asked, Classification) else float(example.answer)
    return Encoded(rows, num_cut)


def is_bare(tokenizer: Any) -> bool:
    """Whether a tokenizer puts nothing around texts, as those of causal models do."""
    return bool(tokenizer.num_special_tokens_to_add(pair=False) == 0)


def _encode_texts(
    examples: Sequence[Example], tokenizer: Any, max_tokens: int | None
) -> tuple[list[dict[str, Any]], int]:
    firsts = [e.given if isinstance(e.given, str) else e.given[0] for e in examples]
    seconds = None if isinstance(examples[0].given, str) else [e.given[1] for e in examples]
    if is_bare(tokenizer):
        return _encode_bare(firsts, seconds, tokenizer, max_tokens)
    whole = tokenizer(firsts, seconds, verbose=False)
    rows = [{name: whole[name][index] for name in whole} for index in range(len(examples))]
    long = [index for index, row in enumerate(rows) if max_tokens is not None and len(row["input_ids"]) > max_tokens]
    for index in long:
        second = None if seconds is None else seconds[index]
        rows[index] = dict(tokenizer(firsts[index], second, truncation=True, max_length=max_tokens))
    return rows, len(long)


def _encode_bare(
    firsts: list[str], seconds: list[str] | None, tokenizer: Any, max_tokens: int | None
) -> tuple[list[dict[str, Any]], int]:
    """Texts that each end with the end-of-text token, at which a causal model is asked.

    Source: Radford et al. 2018, who learn new delimiter and extract tokens; ours is the one that pretraining saw at
    the end of every document.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    columns = [
        tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for texts in (firsts, seconds) if texts
    ]
    rows, num_cut = [], 0
    for texts in zip(*columns, strict=True):
        parts = [list(ids) for ids in texts]
        room = None if max_tokens is None else max_tokens - len(end) * len(parts)
        num_cut += room is not None and sum(map(len, parts)) > room
        while room is not None and sum(map(len, parts)) > room:
            longest = max(parts, key=len)
            others = sum(map(len, parts)) - len(longest)
            shortest = min(map(len, parts))
            # Down to the other's length at most, and then by turns, as the `longest_first` of tokenizers does.
            keep = max(room - others, shortest if len(parts) > 1 else 0)
            del longest[min(keep, len(longest) - 1) :]
        ids = [token for part in parts for token in (*part, *end)]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
    return rows, num_cut


def _encode_words(
    examples: Sequence[Example], start: Start, labels: tuple[str, ...], max_tokens: int | None
) -> Encoded:
    """Words joined by spaces; each word's tag at one of its tokens.

    The first token for models that read both ways, as Devlin et al. (2019); the last for those that read forward only,
    where it is the first that has seen the word. Joining words keeps the tokens that pretraining saw.
    """
    ids = {label: index for index, label in enumerate(labels)}
    names = getattr(start.config, "architectures", None) or [""]
    forward_only = names[0].endswith(("ForCausalLM", "LMHeadModel"))
    texts = [" ".join(example.given) for example in examples]
    encoded = start.tokenizer(texts, return_offsets_mapping=True, verbose=False)
    rows, all_places, num_cut = [], [], 0
    for index, example in enumerate(examples):
        row = {name: encoded[name][index] for name in encoded}
        if max_tokens is not None and len(row["input_ids"]) > max_tokens:
            num_cut += 1
            row = dict(
                start.tokenizer(texts[index], return_offsets_mapping=True, truncation=True, max_length=max_tokens)
            )
        places = word_places(example.given, row.pop("offset_mapping"), last=forward_only)
        row["labels"] = [IGNORE] * len(row["input_ids"])
        for place, tag in zip(places, example.answer, strict=True):
            if place is not None:
                row["labels"][place] = ids[tag]
        rows.append(row)
        all_places.append(places)
    return Encoded(rows, num_cut, all_places)


def word_places(words: Sequence[str], spans: Sequence[tuple[int, int]], *, last: bool) -> list[int | None]:
    """The token of each of some words joined by spaces, given the characters that tokens stand for.

    >>> word_places(["not", "able"], [(0, 0), (0, 3), (4, 6), (6, 8), (0, 0)], last=False)
    [1, 2]
    >>> word_places(["not", "able"], [(0, 0), (0, 3), (4, 6), (6, 8), (0, 0)], last=True)
    [1, 3]

    A token over several words belongs to the first of them; a word that is left without one has no place.
    """
    places: list[int | None] = []
    token, begin = 0, 0
    for word in words:
        end = begin + len(word)
        while token < len(spans) and spans[token][1] <= begin:
            token += 1
        place = None
        while token < len(spans) and spans[token][0] < end:
            if spans[token][1] > spans[token][0] and (last or place is None):
                place = token
            token += 1
        places.append(place)
        begin = end + 1
    return places


def _encode_answers(examples: Sequence[Example], asked: Instructions, start: Start, max_tokens: int | None) -> Encoded:
    tokenizer = start.tokenizer
    template = _template(asked, tokenizer) if asked.messages is not None else None
    rows, num_cut = [], 0
    for example in examples:
        if template is None:
            prompt = list(tokenizer(example.given, verbose=False)["input_ids"])
            if prompt and prompt[-1] == tokenizer.eos_token_id:
                prompt.pop()  # the text goes on
            answer = example.answer
        else:
            text, answer = _rendered(example, template, tokenizer)
            prompt = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        target = list(tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"])
        if tokenizer.eos_token_id is not None and target[-1:] != [tokenizer.eos_token_id]:
            target.append(tokenizer.eos_token_id)
        if max_tokens is not None and len(prompt) + len(target) > max_tokens:
            num_cut += 1
            # Room for the answer first: the beginning of the prompt goes, and only then the end of the answer.
            target = target[: max_tokens - 1]
            prompt = prompt[len(prompt) + len(target) - max_tokens :]
        ids = prompt + target
        labels = [IGNORE] * len(prompt) + target
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return Encoded(rows, num_cut)


def _template(asked: Instructions, tokenizer: Any) -> str:
    if asked.chat_template is None:
        if tokenizer.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template, so conversations cannot become text",
                where=f"task.messages={asked.messages}",
                remedy="name one: task.chat_template=recipes/finetune/chat.jinja; or use prompt and completion",
            )
        return str(tokenizer.chat_template)
    from lmssl.shipped import find

    try:
        return find(asked.chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"the chat template cannot be read: {error.strerror}",
            where=f"task.chat_template={asked.chat_template}",
            remedy="give the path of a Jinja file, such as recipes/finetune/chat.jinja",
        ) from error


def _rendered(example: Example, template: str, tokenizer: Any) -> tuple[str, str]:
    given = [dict(message) for message in example.given]
    options = {"chat_template": template, "tokenize": False}
    prompt = tokenizer.apply_chat_template(given, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template([*given, {"role": "assistant", "content": example.answer}], **options)
    if not whole.startswith(prompt) or whole == prompt:
        raise DataError(
            "the chat template does not go on from the prompt to the answer",
            where=example.where,
            remedy="use a template whose text with add_generation_prompt is the beginning of the whole conversation",
        )
    return prompt, whole[len(prompt) :]
