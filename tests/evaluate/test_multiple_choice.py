"""Multiple choice: sums, sums by byte, and what a choice's tokens are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmssl.errors import EvaluationError
from lmssl.evaluate.multiple_choice import read_choices
from lmssl.evaluate.questions import Result
from lmssl.recipe.suite import MultipleChoiceEvaluation
from runs import write_lines

QUESTIONS: list[dict[str, Any]] = [
    {"question": "The statement is used to", "choices": ["iterate over a sequence", "fly", "eat it all"], "answer": 0},
    {"question": "A name", "choices": ["binds", "is bound to an object in the namespace"], "answer": 1},
    {"question": "Water is", "choices": ["wet", "dry", "the colour of the sea at night"], "answer": "A"},
    {"question": "Two and two", "choices": ["make four", "make five"], "answer": "make four"},
    {"question": "It", "choices": ["was", "were"], "answer": "1"},
]
ANSWERS = [0, 1, 0, 0, 1]


def section(path: str, **fields: Any) -> MultipleChoiceEvaluation:
    return MultipleChoiceEvaluation.model_validate({"name": "q", "kind": "multiple_choice", "path": path, **fields})


@pytest.mark.parametrize("size", [1, 4096])
def test_both_accuracies_are_those_of_a_loop(
    size: int, folder: Any, ask: Callable[..., Result], tmp_path: Path
) -> None:
    path = folder("llama")
    found = ask(path, size, kind="multiple_choice", path=write_lines(tmp_path / "mc.jsonl", QUESTIONS))
    stock = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    right, by_byte = 0, 0
    for values, answer in zip(QUESTIONS, ANSWERS, strict=True):
        context = tokenizer(values["question"])["input_ids"]
        sums = []
        for choice in values["choices"]:
            ids = tokenizer(values["question"] + " " + choice)["input_ids"]
            assert ids[: len(context)] == context  # this tokenizer begins words with their space
            with torch.no_grad():
                logits = stock(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(context), len(ids))))
        right += max(range(len(sums)), key=sums.__getitem__) == answer
        means = [value / len(choice.encode()) for value, choice in zip(sums, values["choices"], strict=True)]
        by_byte += max(range(len(means)), key=means.__getitem__) == answer
    assert found.metrics["accuracy"] == right / len(QUESTIONS)
    assert found.metrics["accuracy_by_byte"] == by_byte / len(QUESTIONS)
    assert found.metrics["num_asked"] == len(QUESTIONS)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_equal_choices_tie_and_are_not_right(
    kind: str, folder: Any, ask: Callable[..., Result], tmp_path: Path
) -> None:
    lines = [{"question": "It is", "choices": ["red", "red"], "answer": 0}]
    found = ask(folder(kind), kind="multiple_choice", path=write_lines(tmp_path / "mc.jsonl", lines)).metrics
    assert (found["accuracy"], found["accuracy_by_byte"], found["num_ties"]) == (0.0, 0.0, 1)


def test_only_the_choice_is_scored(folder: Any, ask: Callable[..., Result], tmp_path: Path) -> None:
    # A question of one choice's tokens or of another's length changes nothing but the context.
    lines = [{"question": "word " * 8 + "is", "choices": ["old", "new"], "answer": 0}]
    path = folder("bert")
    metrics = ask(path, kind="multiple_choice", path=write_lines(tmp_path / "mc.jsonl", lines)).metrics
    turned = [{**lines[0], "answer": 1}]
    other = ask(path, kind="multiple_choice", path=write_lines(tmp_path / "turned.jsonl", turned)).metrics
    assert metrics["accuracy"] != other["accuracy"]


def test_answers_are_numbers_letters_or_texts(tmp_path: Path) -> None:
    found = list(read_choices(section(write_lines(tmp_path / "mc.jsonl", QUESTIONS))))
    assert [choice.answer for choice in found] == ANSWERS


def test_choices_may_stand_in_fields_of_their_own(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "piqa.jsonl", [{"goal": "To open", "sol1": "pull", "sol2": "push", "label": 1}])
    fields = {"question": "goal", "choices": ["sol1", "sol2"], "answer": "label"}
    (found,) = read_choices(section(file, **fields))
    assert (found.question, found.choices, found.answer) == ("To open", ("pull", "push"), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, "the answer 3 is none of the 3 choices"),
        ({"answer": "D"}, "the answer 'D' is none of the 3 choices"),
        ({"answer": True}, "the answer True is none"),
        ({"choices": ["one"]}, "holds no list of two or more texts"),
        ({"choices": "one"}, "holds no list of two or more texts"),
        ({"choices": ["one", 2]}, "the field 'choices.1' holds 2 instead of a text"),
        ({"question": None}, "the field 'question' holds null instead of a text"),
    ],
)
def test_wrong_questions_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "mc.jsonl", [QUESTIONS[0], {**QUESTIONS[0], **change}])
    with pytest.raises(EvaluationError) as caught:
        list(read_choices(section(file)))
    assert message in str(caught.value) and f"{file}, line 2" in str(caught.value)
