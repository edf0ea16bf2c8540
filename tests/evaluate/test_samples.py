"""Texts written by forwards alone are those of transformers' own loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from kinds import with_attention
from lmssl.errors import EvaluationError, TokenizerError
from lmssl.evaluate import generate, samples
from lmssl.evaluate.generate import Sampling, fill_masks, write
from lmssl.evaluate.samples import KINDS, Kind, held_out, prompted, write_samples
from lmssl.evaluate.subject import Subject, open_subject
from lmssl.objective.module import LossModule
from lmssl.tokenizer.load import Tokenizer
from lmssl.tokenizer.words import WordStarts

Folder = Callable[..., Path]
LIKELIEST = Sampling(max_new_tokens=12)


def written(subject: Subject, prompts: list[str], sampling: Sampling, one: Accelerator, **more: Any) -> Any:
    kind: Kind = KINDS[subject.kind or ""]
    objective: Any = None  # what is asked goes past it
    module = LossModule(with_attention(subject.model, "document"), objective, bf16=False).eval()
    blanks = [prompted(kind, subject.reader, prompt) for prompt in prompts]
    return write_samples(module, kind, blanks, subject.reader, one, sampling=sampling, **more)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_continuations_are_the_stock_ones(kind: str, folder: Folder, one: Accelerator) -> None:
    """Texts of several lengths in one batch; gpt2 reads 64 tokens, and the longest text comes to that."""
    prompts = ["The for statement is used", "A", "word " * 55]
    subject = open_subject(folder(kind))
    found = written(subject, prompts, LIKELIEST, one)
    assert [row["prompt"] for row in found] == prompts
    assert [row["text"] for row in found] == [write(subject, prompt, LIKELIEST) for prompt in prompts]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_masks_are_filled_with_the_likeliest_tokens(kind: str, folder: Folder, one: Accelerator) -> None:
    prompts = ["the [MASK] statement is <mask> .", "[MASK] the rows are of other lengths than these ."]
    subject = open_subject(folder(kind))
    found = written(subject, prompts, LIKELIEST, one)
    decode, encode = subject.tokenizer.backend.decode, subject.tokenizer.backend.encode
    for row, prompt in zip(found, prompts, strict=True):
        ids = encode(prompt.replace("<mask>", "[MASK]")).ids
        best = iter(fill_masks(subject, prompt, top_k=1))
        number = {decode([i], skip_special_tokens=False): i for i in range(subject.tokenizer.num_tokens)}
        filled = [number[next(best)[0][0]] if token == subject.tokenizer.mask_id else token for token in ids]
        assert row["text"] == decode(filled)


def test_sentinels_are_filled_as_the_stock_decoder_fills_them(
    folder: Folder, one: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["The <extra_id_0> statement is <extra_id_1>.", "<extra_id_0> A longer text than the other one is."]
    subject = open_subject(folder("t5"))
    with torch.no_grad():  # so that the decoder does not write one token all the time
        for name, parameter in subject.model.named_parameters():
            parameter *= 8 if "block" in name else 1
    decoded: list[list[int]] = []
    fill = generate.sentinels_filled

    def kept(tokenizer: Tokenizer, prompt: str, ids: list[int]) -> str:
        decoded.append(ids)
        return fill(tokenizer, prompt, ids)

    for place in (generate, samples):
        monkeypatch.setattr(place, "sentinels_filled", kept)
    found = written(subject, prompts, LIKELIEST, one)
    assert [row["text"] for row in found] == [write(subject, prompt, LIKELIEST) for prompt in prompts]
    ours, theirs = decoded[:2], decoded[2:]
    assert [[subject.tokenizer.pad_id, *ids] for ids in ours] == theirs
    assert len(set(ours[0])) > 3


def test_draws_follow_seed_and_number_and_leave_the_random_state_alone(folder: Folder, one: Accelerator) -> None:
    subject = open_subject(folder("llama"))
    state = torch.get_rng_state()
    drawn = Sampling(max_new_tokens=10, temperature=1.0, top_p=0.9, seed=3)
    first, again, other = (
        written(subject, ["The", "The"], sampling, one)
        for sampling in (drawn, drawn, Sampling(max_new_tokens=10, temperature=1.0, top_p=0.9, seed=4))
    )
    assert first == again != other
    assert first[0]["text"] != first[1]["text"]
    assert torch.equal(torch.get_rng_state(), state)
    little = Sampling(max_new_tokens=10, temperature=1.0, top_p=1e-9, seed=3)
    assert written(subject, ["The"], little, one) == written(subject, ["The"], Sampling(max_new_tokens=10), one)


def test_it_stops_between_two_tokens(folder: Folder, one: Accelerator) -> None:
    answers = iter([True, True, False])
    assert written(open_subject(folder("llama")), ["The"], LIKELIEST, one, go_on=lambda: next(answers)) is None
    assert next(answers, None) is None
    assert written(open_subject(folder("bert")), ["[MASK]"], LIKELIEST, one, go_on=lambda: False) is None


@pytest.mark.parametrize(
    ("kind", "prompt", "what"),
    [
        ("gpt2", "word " * 80, "and this gpt2 reads at most 64"),
        ("bert", "no gap", "no mask to fill"),
        ("bert", "[MASK] " * 80, "and this bert reads at most 64"),
        ("t5", "no gap", "no sentinel to fill"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(kind: str, prompt: str, what: str, folder: Folder) -> None:
    subject = open_subject(folder(kind))
    with pytest.raises(EvaluationError, match=what):
        prompted(KINDS[subject.kind or ""], subject.reader, prompt)


class Split:
    """Two sequences of held-out text."""

    num_sequences = 2

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def sequence(self, index: int) -> Any:
        """A short segment, a long one, padding."""
        segments = [1] * 3 + [2] * len(self.ids) + [0] * 2
        row = {"ids_T": np.array([self.ids[0]] * 3 + self.ids + [0] * 2), "segments_T": np.array(segments, np.int32)}
        return type("Row", (), row)


TEXT = "the for statement is used to iterate over the elements of a sequence , such as a string or a tuple ."


def test_held_out_text_hides_whole_words_and_says_what_they_were(folder: Folder) -> None:
    subject = open_subject(folder("bert"))
    tokenizer = subject.tokenizer
    ids = tokenizer.backend.encode(TEXT).ids
    first, second = held_out("masked", subject.reader, [Split(ids)], count=2, num_tokens=24)  # type: ignore[list-item]
    assert first.prompt == second.prompt
    assert first.original is not None
    assert TEXT.startswith(first.original[:80])
    assert 0.1 < len(first.places) / len(first.ids) < 0.35
    assert (first.ids[first.places] == tokenizer.mask_id).all()
    assert first.ids[0] == tokenizer.cls_id
    assert first.ids[-1] == tokenizer.sep_id
    assert first.prompt.split()[3] == "[MASK]" and first.original.split()[3] == "is"
    assert first.prompt.split()[:3] == first.original.split()[:3]


def test_where_words_do_not_show_tokens_are_hidden(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def wordless(_: Tokenizer) -> WordStarts:
        raise TokenizerError("no words", where="it", remedy="none")

    monkeypatch.setattr(WordStarts, "of", wordless)
    subject = open_subject(folder("bert"))
    ids = subject.tokenizer.backend.encode(TEXT).ids
    (blank,) = held_out("masked", subject.reader, [Split(ids)], count=1, num_tokens=24)  # type: ignore[list-item]
    assert blank.places.tolist() == [4, 10, 16, 22]


def test_held_out_text_is_continued_from_its_beginning(folder: Folder) -> None:
    subject = open_subject(folder("llama"))
    ids = subject.tokenizer.backend.encode(TEXT).ids
    (blank,) = held_out("causal", subject.reader, [Split(ids)], count=1, num_tokens=24)  # type: ignore[list-item]
    assert blank.ids.tolist() == ids[: min(16, len(ids) // 2)]
    assert TEXT.startswith(blank.prompt)


def test_of_held_out_text_t5_fills_three_tokens(folder: Folder) -> None:
    subject = open_subject(folder("t5"))
    ids = subject.tokenizer.backend.encode(TEXT, add_special_tokens=False).ids
    (blank,) = held_out("span", subject.reader, [Split(ids)], count=1, num_tokens=24)  # type: ignore[list-item]
    assert blank.original is not None
    assert blank.original and blank.original in TEXT
    assert blank.prompt.count("<extra_id_0>") == 1
    assert len(blank.ids) == min(24, len(ids)) - 3 + 2
