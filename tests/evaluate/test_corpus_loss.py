"""Loss of a corpus is that of a loop over its tokens with the stock class, whatever the batches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from lmssl.errors import DataError, EvaluationError
from lmssl.evaluate.corpus_loss import prepare_loss, windows
from lmssl.evaluate.questions import Result
from lmssl.evaluate.score import score_rows
from lmssl.evaluate.subject import open_subject
from lmssl.model.head import IGNORE
from lmssl.objective.causal import CausalObjective
from lmssl.objective.module import LossModule
from lmssl.recipe.suite import LossEvaluation

TEXTS = [
    "The for statement is used to iterate over the elements of a sequence.",
    "x",
    "A break statement executed in the first suite terminates the loop. " * 4,
    "Names <|endoftext|> in the target list are not deleted when the loop is finished; “quoted” naïve text.",
]


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return {"name": "c", "kind": "jsonl", "path": str(path)}


def by_token(stock: Any, documents: list[list[int]], context: int, stride: int) -> tuple[float, int]:
    """Nats and targets, every token alone: its window is the first that reaches it."""
    nats, count = 0.0, 0
    for ids in documents:
        for i in range(1, len(ids)):
            start = 0 if i < context else stride * math.ceil((i - context + 1) / stride)
            with torch.no_grad():
                logits = stock(input_ids=torch.tensor([ids[start:i]])).logits[0, -1]
            nats -= float(logits.double().log_softmax(-1)[ids[i]])
            count += 1
    return nats, count


@given(st.integers(1, 80), st.integers(2, 20), st.data())
def test_windows_predict_every_token_once(num_tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    found = list(windows(num_tokens, context, stride))
    predicted = [i for _, first, end in found for i in range(first, end)]
    assert predicted == list(range(1, num_tokens))
    for number, (start, first, end) in enumerate(found):
        assert 0 < end - start <= context
        assert first - start >= (context - stride if number else 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize(("context", "stride"), [(16, 5), (64, None)])
def test_causal_loss_is_that_of_a_loop_over_tokens(
    kind: str, context: int, stride: int | None, folder: Any, ask: Callable[..., Result], corpus: dict[str, Any]
) -> None:
    path = folder(kind)
    found = ask(path, kind="loss", corpus=corpus, context_tokens=context, stride_tokens=stride).metrics
    stock = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    documents = [ids.tolist() for ids in open_subject(path).reader.encode(TEXTS)]
    nats, count = by_token(stock, documents, context, stride or context // 2)
    assert found["num_targets"] == count
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert (found["num_bytes"], found["num_documents"]) == (num_bytes, len(TEXTS))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "bert", "albert", "modernbert", "roberta"])
def test_batches_change_nothing(kind: str, folder: Any, ask: Callable[..., Result], corpus: dict[str, Any]) -> None:
    whole, *others = (
        ask(folder(kind), batch_tokens=size, kind="loss", corpus=corpus, context_tokens=24).metrics
        for size in (1, 60, 10_000)
    )
    for other in others:
        assert other == pytest.approx(whole, rel=1e-6)


def test_documents_may_be_read_whole_and_then_equal_packed_training(
    folder: Any, ask: Callable[..., Result], corpus: dict[str, Any]
) -> None:
    path = folder("llama", max_position_embeddings=128)
    found = ask(path, kind="loss", corpus=corpus, window="document").metrics
    subject = open_subject(path)
    documents = subject.reader.encode(TEXTS)
    ids, segments = np.concatenate(documents)[None], np.repeat(np.arange(len(documents)) + 1, [*map(len, documents)])
    targets = np.roll(ids, -1)
    targets[0, np.append(segments[1:] != segments[:-1], True)] = IGNORE
    offsets = np.concatenate([np.arange(len(document)) for document in documents])[None]
    inputs = {
        "ids_BT": ids,
        "segments_BT": segments[None].astype(np.int32),
        "offsets_BT": offsets,
        "targets_BT": targets,
    }
    with torch.no_grad():
        module = LossModule(subject.model, CausalObjective(), bf16=False)
        packed = float(module({name: torch.from_numpy(array) for name, array in inputs.items()})["causal"])
    assert found["loss"] == pytest.approx(packed / int((targets != IGNORE).sum()), rel=1e-5)


def test_bos_is_read_and_not_predicted(folder: Any, ask: Callable[..., Result], corpus: dict[str, Any]) -> None:
    path = folder("llama")
    found = ask(path, kind="loss", corpus=corpus, context_tokens=32, stride_tokens=8, prefix="bos").metrics
    stock = AutoModelForCausalLM.from_pretrained(path).eval()
    documents = [[0, *ids.tolist()] for ids in open_subject(path).reader.encode(TEXTS)]
    nats, count = by_token(stock, documents, 32, 8)
    assert found["num_targets"] == count
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)


class Ranks:
    """One of several processes, without the others."""

    device = torch.device("cpu")

    def __init__(self, rank: int, num_processes: int) -> None:
        self.process_index, self.num_processes = rank, num_processes

    def reduce(self, tensor: torch.Tensor, _how: str) -> torch.Tensor:
        return tensor


def test_processes_share_the_rows_and_run_equally_often(folder: Any, corpus: dict[str, Any], one: Accelerator) -> None:
    subject = open_subject(folder("llama"))
    section = LossEvaluation.model_validate({"name": "q", "kind": "loss", "corpus": corpus, "context_tokens": 16})
    rows = prepare_loss(section, subject.reader).rows
    whole = score_rows(subject.model, rows, one, causal=True, batch_tokens=40)
    assert whole is not None
    calls = []
    hook = subject.model.base_model.register_forward_hook(lambda *_: calls.append(rank))
    parts = []
    for rank in range(4):
        there: Any = Ranks(rank, 4)
        found = score_rows(subject.model, rows, there, causal=True, batch_tokens=40)
        assert found is not None
        parts.append(found.nats)
    hook.remove()
    assert [calls.count(rank) for rank in range(4)] == [len(calls) // 4] * 4
    assert np.array_equal(np.sum(parts, axis=0), whole.nats)  # each row is one rank's alone
    assert score_rows(subject.model, rows, one, causal=True, batch_tokens=40, go_on=lambda: False) is None


@pytest.mark.parametrize("kind", ["bert", "albert", "roberta", "modernbert"])
def test_masked_loss_is_that_of_stock_rows(
    kind: str, folder: Any, ask: Callable[..., Result], corpus: dict[str, Any]
) -> None:
    path = folder(kind)
    subject = open_subject(path)
    section = LossEvaluation.model_validate({"name": "q", "kind": "loss", "corpus": corpus, "context_tokens": 32})
    rows, again = (prepare_loss(section, subject.reader).rows for _ in range(2))
    stock = AutoModelForMaskedLM.from_pretrained(path, attn_implementation="eager").eval()
    nats, count = 0.0, 0
    for row, same in zip(rows, again, strict=True):
        assert np.array_equal(row.ids, same.ids)
        assert row.ids[0] == 2 and row.ids[-1] == 3 and len(row.ids) <= 32  # [CLS], [SEP]
        with torch.no_grad():
            logits = stock(input_ids=torch.from_numpy(row.ids)[None]).logits[0].double().log_softmax(-1)
        nats -= float(logits[row.places, row.targets].sum())
        count += len(row.targets)
    found = ask(path, kind="loss", corpus=corpus, context_tokens=32).metrics
    assert found["num_targets"] == count
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    num_tokens = sum(map(len, subject.reader.encode(TEXTS)))
    assert 0.1 * num_tokens < count < 0.2 * num_tokens
    share = count / num_tokens
    assert found["num_bytes"] == pytest.approx(share * sum(len(t.encode()) for t in TEXTS), rel=0.5)


def test_a_budget_ends_with_a_whole_document(folder: Any, ask: Callable[..., Result], corpus: dict[str, Any]) -> None:
    first = len(open_subject(folder("llama")).reader.encode(TEXTS[:1])[0])
    budgets = {first: 1, first + 1: 2, 10_000: len(TEXTS)}
    found = {tokens: ask(folder("llama"), kind="loss", corpus=corpus, tokens=tokens).metrics for tokens in budgets}
    assert {tokens: metrics["num_documents"] for tokens, metrics in found.items()} == budgets


def test_longer_documents_than_the_model_reads_are_refused_whole(
    folder: Any, ask: Callable[..., Result], corpus: dict[str, Any]
) -> None:
    with pytest.raises(EvaluationError, match="a document has 53 tokens, and this gpt2 reads at most 48") as caught:
        ask(folder("gpt2", n_positions=48), kind="loss", corpus=corpus, window="document")
    assert "record 2" in str(caught.value) and caught.value.exit_code == 10
    with pytest.raises(EvaluationError, match="windows of 65 tokens"):
        ask(folder("gpt2"), kind="loss", corpus=corpus, context_tokens=65)


def test_bad_records_stop_the_evaluation(
    folder: Any, ask: Callable[..., Result], corpus: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(file.read_text(encoding="utf-8") + "{\n", encoding="utf-8")
    with pytest.raises(DataError, match="1 unreadable records") as caught:
        ask(folder("llama"), kind="loss", corpus=corpus)
    assert "texts.jsonl, record 4" in str(caught.value)
    assert ask(folder("llama"), kind="loss", corpus=corpus, max_bad_records=1).metrics["num_documents"] == 4
    file.write_text(json.dumps({"text": "  "}) + "\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="nothing to predict"):
        ask(folder("llama"), kind="loss", corpus=corpus)
