from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmssl.errors import DataError
from lmssl.finetune.inputs import IGNORE, encode, word_places
from lmssl.finetune.rows import Example
from lmssl.finetune.start import Start, open_start
from lmssl.finetune.task import Classification, Instructions, Regression, Tokens

CLASSES = Classification(kind="classification")
LABELS = ("no", "yes")


def encoded(start: Start, asked: Any, *given: tuple[Any, Any], max_tokens: int | None = 64) -> Any:
    labels = LABELS if isinstance(asked, Classification) else ("X", "Y")
    return encode([Example(*pair, "here") for pair in given], asked, start, labels=labels, max_tokens=max_tokens)


def test_an_encoder_gets_its_own_special_tokens(bert: Path) -> None:
    start = open_start(str(bert))
    found = encoded(start, CLASSES, (("a red house", "a blue one"), "yes"), (("if", "while"), "no"))
    first = found.rows[0]
    assert start.tokenizer.decode(first["input_ids"]) == "[CLS] a red house [SEP] a blue one [SEP]"
    assert sorted(set(first["token_type_ids"])) == [0, 1]
    assert [row["labels"] for row in found.rows] == [1, 0]


def test_a_causal_model_is_asked_at_the_end_of_each_text(llama: Path) -> None:
    start = open_start(str(llama))
    found = encoded(start, CLASSES, (("a red house", "a blue one"), "yes"))
    text = start.tokenizer.decode(found.rows[0]["input_ids"])
    assert text == "a red house<|endoftext|>a blue one<|endoftext|>"
    (row,) = encoded(start, CLASSES, ("a red house", "yes")).rows
    assert start.tokenizer.decode(row["input_ids"]) == "a red house<|endoftext|>"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_long_texts_are_cut_and_counted(family: str, request: pytest.FixtureRequest) -> None:
    start = open_start(str(request.getfixturevalue(family)))
    assert start.max_tokens == 64
    found = encoded(start, CLASSES, ("the " * 100, "yes"), ("the", "no"), max_tokens=20)
    assert found.num_cut == 1
    assert len(found.rows[0]["input_ids"]) == 20
    pairs = encoded(start, CLASSES, (("the " * 100, "and " * 5), "yes"), max_tokens=20)
    ids = pairs.rows[0]["input_ids"]
    assert len(ids) == 20
    text = start.tokenizer.decode(ids)
    assert text.count("and") == 5
    assert text.rstrip().endswith("[SEP]" if family == "bert" else "<|endoftext|>")
    both = encoded(start, CLASSES, (("the " * 100, "and " * 100), "yes"), max_tokens=20)
    text = start.tokenizer.decode(both.rows[0]["input_ids"])
    assert abs(text.count("and") - text.count("the")) <= 1


def test_numbers_stay_numbers(bert: Path) -> None:
    (row,) = encoded(open_start(str(bert)), Regression(kind="regression"), ("red", 2.5)).rows
    assert row["labels"] == 2.5


@pytest.mark.parametrize(("family", "last"), [("bert", False), ("llama", True)])
def test_a_tag_stands_at_one_token_of_its_word(family: str, last: bool, request: pytest.FixtureRequest) -> None:
    start = open_start(str(request.getfixturevalue(family)))
    words = ("the", "unforgettable", "internationalization", "(", "café", ")")
    found = encoded(start, Tokens(kind="tokens"), (words, ("X", "Y", "X", "Y", "X", "Y")))
    (row,), (places,) = found.rows, found.word_places
    assert [row["labels"][place] for place in places] == [0, 1, 0, 1, 0, 1]
    assert sum(label != IGNORE for label in row["labels"]) == len(words)
    spans = start.tokenizer(" ".join(words), return_offsets_mapping=True)["offset_mapping"]
    starts = [len(" ".join(words[:n])) + (n > 0) for n in range(len(words))]
    for place, begin, word in zip(places, starts, words, strict=True):
        edge = spans[place][1] if last else spans[place][0]
        assert edge == begin + len(word) if last else begin - 1 <= edge <= begin


def test_words_that_are_cut_off_have_no_place(bert: Path) -> None:
    found = encoded(open_start(str(bert)), Tokens(kind="tokens"), (("red",) * 50, ("X",) * 50), max_tokens=12)
    assert found.num_cut == 1
    assert found.word_places[0] == [*range(1, 11), *[None] * 40]


def test_a_token_over_two_words_belongs_to_the_first() -> None:
    assert word_places(["a", "b", "c"], [(0, 3), (3, 5)], last=False) == [0, None, 1]


def test_only_the_answer_is_learned(llama: Path) -> None:
    start = open_start(str(llama))
    (row,) = encoded(start, Instructions(kind="instructions"), ("What is red?", " A colour.")).rows
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE]
    assert start.tokenizer.decode(learned) == " A colour.<|endoftext|>"
    assert start.tokenizer.decode(row["input_ids"]) == "What is red? A colour.<|endoftext|>"
    assert all(label in (IGNORE, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_the_answer_has_room_first(llama: Path) -> None:
    start = open_start(str(llama))
    found = encoded(start, Instructions(kind="instructions"), ("red " * 100, " A colour."), max_tokens=16)
    assert found.num_cut == 1
    text = start.tokenizer.decode(found.rows[0]["input_ids"])
    assert len(found.rows[0]["input_ids"]) == 16
    assert text.endswith(" A colour.<|endoftext|>")


def test_conversations_need_a_template(llama: Path, root: Path, tmp_path: Path) -> None:
    start = open_start(str(llama))
    asked = Instructions(kind="instructions", messages="messages")
    chat = (
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go."},
    )
    with pytest.raises(DataError, match=r"(?s)no chat template.*chat\.jinja"):
        encoded(start, asked, (chat, "Gone."))
    shipped = asked.model_copy(update={"chat_template": str(root / "recipes/finetune/chat.jinja")})
    (row,) = encoded(start, shipped, (chat, "Gone.")).rows
    text = start.tokenizer.decode(row["input_ids"])
    assert text == "User: Hi!\nAssistant: Yes?<|endoftext|>User: Go.\nAssistant: Gone.<|endoftext|>"
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE]
    assert start.tokenizer.decode(learned) == " Gone.<|endoftext|>"
    with pytest.raises(DataError, match="cannot be read"):
        encoded(start, asked.model_copy(update={"chat_template": str(tmp_path / "none")}), (chat, "Gone."))
    odd = tmp_path / "odd.jinja"
    odd.write_text("{{ messages | length }}", encoding="utf-8")
    with pytest.raises(DataError, match="does not go on"):
        encoded(start, asked.model_copy(update={"chat_template": str(odd)}), (chat, "Gone."))
