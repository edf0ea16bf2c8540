"""Continuations, filled masks and filled gaps are those of the stock classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from lmssl.cli import main
from lmssl.errors import EvaluationError
from lmssl.evaluate.generate import Sampling, fill_masks, look, write
from lmssl.evaluate.subject import open_subject
from lmssl.evaluate.suite import load_suite

PROMPT = "The for statement is used"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_the_likeliest_continuation_is_the_stock_one(kind: str, folder: Any) -> None:
    path = folder(kind)
    stock = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, stock(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert write(open_subject(path), PROMPT, Sampling(max_new_tokens=12)) == tokenizer.decode(ids[0])


def test_draws_follow_the_seed_and_leave_the_random_state_alone(folder: Any) -> None:
    subject = open_subject(folder("llama"))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (
        write(subject, PROMPT, Sampling(max_new_tokens=10, temperature=1.0, top_p=0.9, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.startswith(PROMPT) and len(first) > len(PROMPT)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_stops_where_it_can_read_no_more(folder: Any) -> None:
    subject = open_subject(folder("gpt2"))
    text = write(subject, "word " * 30, Sampling(max_new_tokens=1000))
    assert len(subject.tokenizer.backend.encode(text).ids) <= 66
    with pytest.raises(EvaluationError, match="and this gpt2 reads at most 64"):
        write(subject, "word " * 80, Sampling())
    with pytest.raises(EvaluationError, match="the prompt is empty"):
        write(subject, "", Sampling())


@pytest.mark.parametrize("kind", ["bert", "roberta", "albert"])
def test_masks_are_filled_as_the_stock_class_fills_them(kind: str, folder: Any) -> None:
    path = folder(kind)
    stock = AutoModelForMaskedLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = "The [MASK] statement is <mask>."
    encoded = tokenizer(prompt.replace("<mask>", "[MASK]"), return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        shares = stock(**encoded).logits[0].softmax(-1)
    found = fill_masks(open_subject(path), prompt, top_k=3)
    places = (encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0].tolist()
    assert len(found) == len(places) == 2
    for place, candidates in zip(places, found, strict=True):
        best = shares[place, : len(tokenizer)].topk(3)
        assert [token for token, _ in candidates] == [tokenizer.decode([i]) for i in best.indices.tolist()]
        assert [share for _, share in candidates] == pytest.approx(best.values.tolist(), rel=1e-4)
    lines = look(open_subject(path), prompt, Sampling(), top_k=3).splitlines()
    assert len(lines) == 7 and lines[3] == ""
    filled = write(open_subject(path), prompt, Sampling())
    assert filled.startswith("The " + found[0][0][0]) and "[MASK]" not in filled


def test_gaps_are_filled_by_their_sentinels(folder: Any) -> None:
    path = folder("t5")
    prompt = "The <extra_id_0> statement is <extra_id_1>."
    tokenizer = AutoTokenizer.from_pretrained(path)
    stock = AutoModelForSeq2SeqLM.from_pretrained(path).eval()
    with torch.no_grad():
        ids = stock.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)[0]
    written = tokenizer.decode(ids)
    text = write(open_subject(path), prompt, Sampling(max_new_tokens=8))
    assert text.startswith("The ") and text.endswith(".")
    assert ("<extra_id_0>" in text) == ("<extra_id_0>" not in written)


def test_nothing_to_fill_is_said(folder: Any) -> None:
    with pytest.raises(EvaluationError, match="no mask to fill") as caught:
        write(open_subject(folder("bert")), "no gap", Sampling())
    assert "[MASK]" in str(caught.value)
    with pytest.raises(EvaluationError, match="no sentinel to fill"):
        write(open_subject(folder("t5")), "no gap", Sampling())


def test_the_verb_prints(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder("llama")), PROMPT, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith(PROMPT)
    assert main(["generate", str(folder("bert")), "The [MASK] is.", "--top-k", "2"]) == 0
    assert capsys.readouterr().out.count("%") == 2
    assert main(["generate", "gone", PROMPT]) == 10


def test_samples_of_a_suite(folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        'evaluations: [{name: look, kind: samples, prompts: ["The [MASK] is."], max_new_tokens: 4}]\n', encoding="utf-8"
    )
    assert load_suite(path).evaluations[0].name == "look"
    for kind in ("llama", "bert"):
        assert main(["eval", str(folder(kind)), "--suite", str(path)]) == 0
        assert "look: The " in capsys.readouterr().out
