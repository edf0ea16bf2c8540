"""Minimal pairs are judged by the sums a loop over tokens gives; ties are never right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from lmssl.errors import DataError, EvaluationError
from lmssl.evaluate.intervals import wilson
from lmssl.evaluate.minimal_pairs import read_pairs
from lmssl.evaluate.questions import Result
from lmssl.evaluate.reader import Asked
from lmssl.evaluate.score import score_rows
from lmssl.evaluate.subject import open_subject
from lmssl.recipe.suite import MinimalPairsEvaluation
from runs import write_lines

PAIRS = [
    ("The cat that chased the dogs is tired.", "The cat that chased the dogs are tired.", "agreement"),
    ("Who did she see?", "Who did she see him unbelievably?", "gaps"),
    ("These tables are old.", "These table are old.", "agreement"),
    ("He saw himself.", "He saw herself.", "binding"),
    ("Nobody has ever been there.", "Somebody has ever been there.", "npi"),
]
SENTENCES = [sentence for good, bad, _ in PAIRS for sentence in (good, bad)]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return write_lines(
        tmp_path / "pairs.jsonl", [{"sentence_good": a, "sentence_bad": b, "UID": uid} for a, b, uid in PAIRS]
    )


def likelihoods(path: Path, one: Any, *, batch_tokens: int = 512, within_word: bool = False) -> list[float]:
    """Ours, of every sentence."""
    subject = open_subject(path)
    texts = subject.reader.texts(SENTENCES, "auto", SENTENCES, where="here")
    asked = Asked.of(subject.reader, texts, within_word=within_word)
    found = score_rows(subject.model, asked.rows, one, causal=subject.reader.causal, batch_tokens=batch_tokens)
    assert found is not None
    return asked.log_likelihoods(found.nats).tolist()


def causal_loop(path: Path, sentence: str) -> float:
    """The stock class, token by token."""
    stock = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    ids = AutoTokenizer.from_pretrained(path)(sentence)["input_ids"]
    total = 0.0
    for i in range(1, len(ids)):
        with torch.no_grad():
            total += float(stock(input_ids=torch.tensor([ids[:i]])).logits[0, -1].double().log_softmax(-1)[ids[i]])
    return total


def masked_loop(path: Path, sentence: str, *, within_word: bool) -> float:
    """The stock class, with one token hidden after another, or it and the rest of its word."""
    stock = AutoModelForMaskedLM.from_pretrained(path, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    encoded = tokenizer(sentence)
    ids, words = encoded["input_ids"], encoded.word_ids()
    total = 0.0
    for i in range(1, len(ids) - 1):
        hidden = list(ids)
        hidden[i] = tokenizer.mask_token_id
        if within_word:
            hidden[i:] = [tokenizer.mask_token_id if words[k] == words[i] else ids[k] for k in range(i, len(ids))]
        with torch.no_grad():
            total += float(stock(input_ids=torch.tensor([hidden])).logits[0, i].double().log_softmax(-1)[ids[i]])
    return total


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_log_likelihoods_are_those_of_a_loop(kind: str, folder: Any, one: Any) -> None:
    ours = likelihoods(folder(kind), one)
    assert ours == pytest.approx([causal_loop(folder(kind), sentence) for sentence in SENTENCES], rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "modernbert", "albert", "electra"])
@pytest.mark.parametrize("within_word", [False, True])
def test_pseudo_log_likelihoods_are_those_of_a_loop(kind: str, within_word: bool, folder: Any, one: Any) -> None:
    ours = likelihoods(folder(kind), one, within_word=within_word)
    theirs = [masked_loop(folder(kind), sentence, within_word=within_word) for sentence in SENTENCES]
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_hiding_the_rest_of_a_word_matters_only_where_words_have_several_tokens(folder: Any, one: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder("bert"))
    single = [len(set(tokenizer(s).word_ids())) == len(tokenizer(s)["input_ids"]) - 1 for s in SENTENCES]
    assert True in single and False in single
    plain, whole = likelihoods(folder("bert"), one), likelihoods(folder("bert"), one, within_word=True)
    assert [a == pytest.approx(b, rel=1e-6) for a, b in zip(plain, whole, strict=True)] == single


@pytest.mark.parametrize("kind", ["llama", "roberta", "albert"])
def test_batches_change_nothing_and_results_stay_in_order(kind: str, folder: Any, one: Any) -> None:
    apart = likelihoods(folder(kind), one, batch_tokens=1)
    assert len({round(value, 3) for value in apart}) == len(SENTENCES)
    for size in (30, 4096):
        assert likelihoods(folder(kind), one, batch_tokens=size) == pytest.approx(apart, rel=1e-6)


def test_a_table_of_paradigms(folder: Any, ask: Callable[..., Result], pairs: str) -> None:
    found = ask(folder("llama"), kind="minimal_pairs", path=pairs)
    values = [causal_loop(folder("llama"), sentence) for sentence in SENTENCES]
    right = [values[2 * i] > values[2 * i + 1] for i in range(len(PAIRS))]
    for paradigm in {uid for *_, uid in PAIRS}:
        asked = [r for r, (*_, uid) in zip(right, PAIRS, strict=True) if uid == paradigm]
        part = found.parts[paradigm]
        assert part["accuracy"] == sum(asked) / len(asked) and part["num_asked"] == len(asked)
        assert (part["low"], part["high"]) == wilson(sum(asked), len(asked))
    assert found.metrics["accuracy"] == sum(right) / len(right)
    accuracies = [part["accuracy"] or 0 for part in found.parts.values()]
    assert found.metrics["mean_accuracy"] == pytest.approx(sum(accuracies) / len(accuracies))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_ties_are_not_right(kind: str, folder: Any, ask: Callable[..., Result], tmp_path: Path) -> None:
    same = write_lines(tmp_path / "same.jsonl", [{"sentence_good": a, "sentence_bad": a} for a, *_ in PAIRS])
    found = ask(folder(kind), kind="minimal_pairs", path=same, batch_tokens=40)
    assert (found.metrics["accuracy"], found.metrics["num_ties"]) == (0.0, len(PAIRS))


def test_a_model_of_equal_logits_is_never_right(folder: Any, ask: Callable[..., Result], tmp_path: Path) -> None:
    path = folder("llama", tie_word_embeddings=False, rms_norm_eps=1e-5)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    flat = tmp_path / "flat"
    model.save_pretrained(flat)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (flat / name).write_bytes((path / name).read_bytes())
    lines = [{"sentence_good": "The big old cat.", "sentence_bad": "The old big cat."}] * 3
    file = write_lines(tmp_path / "equal.jsonl", lines)
    found = ask(flat, kind="minimal_pairs", path=file)
    assert (found.metrics["accuracy"], found.metrics["num_ties"]) == (0.0, 3)


def section(path: str, **fields: Any) -> MinimalPairsEvaluation:
    return MinimalPairsEvaluation.model_validate({"name": "q", "kind": "minimal_pairs", "path": path, **fields})


def test_files_of_zorro_hold_the_bad_sentence_first(tmp_path: Path) -> None:
    file = tmp_path / "case-subjective_pronoun.txt"
    file.write_text("me saw it .\ni saw it .\n\nhim ran .\nhe ran .\n", encoding="utf-8")
    found = list(read_pairs(section(str(file))))
    assert [(p.good, p.bad) for p in found] == [("i saw it .", "me saw it ."), ("he ran .", "him ran .")]
    assert {p.paradigm for p in found} == {"case-subjective_pronoun"}
    file.write_text("me saw it .\ni saw it .\nhim ran .\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="no partner") as caught:
        list(read_pairs(section(str(file))))
    assert f"{file}, line 3" in str(caught.value)


def test_fields_and_paradigms_can_be_named(tmp_path: Path) -> None:
    lines = [{"yes": "A.", "no": "B.", "set": "x"}, {"yes": "C.", "no": "D.", "set": "y", "UID": "z"}]
    file = write_lines(tmp_path / "mine.jsonl", lines)
    found = list(read_pairs(section(file, good="yes", bad="no")))
    assert [(p.good, p.bad, p.paradigm) for p in found] == [("A.", "B.", "mine"), ("C.", "D.", "z")]
    assert [p.paradigm for p in read_pairs(section(file, good="yes", bad="no", paradigm="set"))] == ["x", "y"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence_good": "A."}', "the field 'sentence_bad' is missing; the fields are sentence_good"),
        ('{"sentence_good": "A.", "sentence_bad": 3}', "the field 'sentence_bad' holds 3 instead of a text"),
        ('{"sentence_good": " ", "sentence_bad": "B."}', "the field 'sentence_good' holds an empty text"),
        ("[1]", "the line holds a JSON list instead of an object"),
        ("{", "the line is not JSON"),
        (b"\xff", "the line is not UTF-8"),
    ],
)
def test_wrong_lines_are_named(line: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    good = json.dumps({"sentence_good": "A.", "sentence_bad": "B."}).encode()
    file.write_bytes(good + b"\n\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(EvaluationError) as caught:
        list(read_pairs(section(str(file))))
    assert message in str(caught.value)
    assert f"{file}, line 3" in str(caught.value)


def test_empty_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n \n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="the file is empty") as caught:
        list(read_pairs(section(str(tmp_path / "pairs.jsonl"))))
    assert "pairs.jsonl" in str(caught.value)
    with pytest.raises(DataError, match="matches no file"):
        list(read_pairs(section(str(tmp_path / "*.json"))))


def test_a_longer_sentence_than_the_model_reads_is_named(
    folder: Any, ask: Callable[..., Result], tmp_path: Path
) -> None:
    file = write_lines(
        tmp_path / "long.jsonl",
        [{"sentence_good": "A.", "sentence_bad": "B."}, {"sentence_good": "A.", "sentence_bad": "word " * 80}],
    )
    with pytest.raises(EvaluationError, match="and this gpt2 reads at most 64") as caught:
        ask(folder("gpt2"), kind="minimal_pairs", path=file)
    assert f"{file}, line 2" in str(caught.value)
