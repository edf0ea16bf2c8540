"""BERT's two tasks: the stock loss of each pair, counts, and bad recipes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from transformers import BertForPreTraining, PreTrainedModel

from lmssl.data.batch import SequenceBatch
from lmssl.errors import RecipeError
from lmssl.model import products
from lmssl.model.build import build_config, build_model
from lmssl.model.head import IGNORE
from lmssl.objective.build import build_objective
from lmssl.objective.masking import Masking
from lmssl.objective.module import LossModule
from lmssl.objective.pairs import Pairs
from lmssl.objective.sentence import SentenceObjective
from lmssl.recipe.load import load_recipe
from lmssl.recipe.model import ModelSection
from lmssl.recipe.objective import MaskedObjective as Section
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.tokenizer.offsets import surface_bytes
from lmssl.tokenizer.words import WordStarts
from sequences import packed, segments_of

LENGTH = 48
DISTILBERT = "{kind: distilbert, dim: 32, hidden_dim: 64, n_layers: 2, n_heads: 2}"
ROWS = ([12, 20, 16], [LENGTH], [9, 30], [], [4, 30, 8])


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Tokenizer:
    return load_tokenizer(root / "tokenizer/wordpiece-8k")


def objective(tokenizer: Tokenizer, task: str) -> SentenceObjective:
    masking = Masking.of(Section(kind="masked"), tokenizer, 7, 1000)
    return SentenceObjective(masking, surface_bytes(tokenizer), pairs=Pairs(task, 7, WordStarts.of(tokenizer)))


@pytest.fixture
def model(tokenizer: Tokenizer) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    section = TypeAdapter(ModelSection).validate_python({"kind": "bert", **sizes})
    config = build_config(section, vocab_size=8192, sequence_length=LENGTH, tokenizer=tokenizer, objective="masked")
    found = build_model(config, objective="masked", seed=1, sentences=True)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return found


def batch(*rows: list[int]) -> SequenceBatch:
    found = packed(*rows, length=LENGTH, first=5, vocab_size=8000)
    for row, _, place in segments_of(found):
        found.ids_BT[row, place[0]], found.ids_BT[row, place[-2:]] = 2, 3
    return found


@pytest.mark.parametrize("task", ["order", "next"])
def test_losses_are_the_stock_ones_of_each_pair(tokenizer: Tokenizer, model: PreTrainedModel, task: str) -> None:
    ours = objective(tokenizer, task)
    micro = ours.prepare(batch(*ROWS))
    sums = LossModule(model, ours, bf16=False)(micro.inputs)
    assert isinstance(model, BertForPreTraining)
    stock = BertForPreTraining._from_config(copy.deepcopy(model.config), attn_implementation="eager")
    stock.load_state_dict(model.state_dict())
    labels = torch.full_like(micro.inputs["ids_BT"], IGNORE)
    heads = torch.full_like(labels, IGNORE)
    for row in range(len(ROWS)):
        kept = micro.inputs["targets_BC"][row] != IGNORE
        labels[row][micro.inputs["places_BC"][row][kept]] = micro.inputs["targets_BC"][row][kept]
        kept = micro.inputs["follows_BP"][row] != IGNORE
        heads[row][micro.inputs["heads_BP"][row][kept]] = micro.inputs["follows_BP"][row][kept]
    masked, sentence, right = torch.zeros(()), torch.zeros(()), 0
    for row in range(len(ROWS)):
        segments = micro.inputs["segments_BT"][row]
        for number in range(1, int(segments.max()) + 1):
            inside = segments == number
            wanted, follows = labels[row][inside][None], heads[row][inside][:1]
            ids, types = micro.inputs["ids_BT"][row][inside][None], micro.inputs["types_BT"][row][inside][None]
            out = stock(input_ids=ids, token_type_ids=types, labels=wanted, next_sentence_label=follows)
            nats = torch.nn.functional.cross_entropy(out.seq_relationship_logits, follows, reduction="sum")
            sentence = sentence + nats
            right += int((out.seq_relationship_logits.argmax(-1) == follows).sum())
            if (wanted != IGNORE).any() and follows != IGNORE:
                masked = masked + (out.loss - nats) * (wanted != IGNORE).sum()
            elif (wanted != IGNORE).any():
                logits = out.prediction_logits[0]
                masked = masked + torch.nn.functional.cross_entropy(logits, wanted[0], reduction="sum")
    torch.testing.assert_close(sums["masked"], masked, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums["sentence"], sentence, rtol=1e-5, atol=1e-4)
    assert int(sums["sentence_accuracy"]) == right
    assert int(sums["paired_ratio"]) == micro.counts["sentence"]
    (masked + 3 * sentence).backward()
    (sums["masked"] + 3 * sums["sentence"]).backward()
    for (name, got), expected in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert got.grad is not None and expected.grad is not None
        atol = 1e-5 * float(expected.grad.abs().max()) + 1e-5
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=atol, msg=name)


def test_counts_and_shapes(tokenizer: Tokenizer) -> None:
    """A segment of one token is no pair, and one alone in its row has nothing to exchange."""
    for task, wanted in (("order", 8), ("next", 7)):
        micro = objective(tokenizer, task).prepare(batch(*ROWS))
        assert micro.counts["sentence"] == micro.counts["sentence_accuracy"] == wanted
        assert micro.counts["paired_ratio"] == 9
        assert micro.counts["masked"] == micro.counts["accuracy"] > 20
        assert micro.inputs["follows_BP"].shape == (5, LENGTH // 5)
    assert objective(tokenizer, "next").weights == {"masked": 1.0, "sentence": 1.0}


def test_a_batch_without_text_is_harmless(tokenizer: Tokenizer, model: PreTrainedModel) -> None:
    ours = objective(tokenizer, "next")
    micro = ours.prepare(batch([], []))
    assert set(micro.counts.values()) == {0}
    sums = LossModule(model, ours, bf16=False)(micro.inputs)
    assert all(float(value.detach()) == 0.0 for value in sums.values())
    (sums["masked"] + sums["sentence"]).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_it_compiles_as_one_graph(
    tokenizer: Tokenizer, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_compile", lambda function: function)  # tested with the compiler on its own
    ours = pickle.loads(pickle.dumps(objective(tokenizer, "next")))
    core, inputs = LossModule(model, ours, bf16=False), ours.prepare(batch(*ROWS)).inputs
    compiled = torch.compile(core, backend="aot_eager", fullgraph=True, dynamic=False)(inputs)
    torch.testing.assert_close(compiled, core(inputs), rtol=1e-5, atol=1e-4)


def test_the_recipe_arrives(root: Path, tokenizer: Tokenizer) -> None:
    recipe = load_recipe(root / "recipes/debug/sentence-bert.yaml", ["objective.sentence_task=order"]).recipe
    found = build_objective(recipe, tokenizer, num_positions=10)
    assert isinstance(found, SentenceObjective)
    assert (found.pairs.task, found.pairs.seed, found.masking.rate) == ("order", recipe.data_seed, 0.15)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ([f"model={DISTILBERT}"], "only bert has a class for pairs of sentences, and model.kind is distilbert"),
        (["data.packing=none"], r"(?s)with data.packing=none every sequence has one segment.*use order, or leave data"),
        (["data.document_attention=false"], "asks about every segment by itself"),
        (["data.cls=false"], "data.cls"),
        (["data.sep=false"], "data.sep"),
        (["model.type_vocab_size=1"], "pairs of sentences need 2 kinds"),
        (["objective.sentence_task=both"], "sentence_task"),
    ],
)
def test_what_does_not_go_together_is_refused(root: Path, change: list[str], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        load_recipe(root / "recipes/debug/sentence-bert.yaml", change)


def test_segments_that_stand_alone_can_be_asked_about_their_order(root: Path, tokenizer: Tokenizer) -> None:
    """One document in each sequence: half of their halves are swapped, and none could be exchanged."""
    change = ["data.packing=none", "objective.sentence_task=order"]
    assert load_recipe(root / "recipes/debug/sentence-bert.yaml", change).recipe.data.packing == "none"
    alone = batch(*([12 + row] for row in range(20)))
    assert objective(tokenizer, "order").prepare(alone).counts["sentence"] == 20
    assert objective(tokenizer, "next").prepare(alone).counts["sentence"] == 0
