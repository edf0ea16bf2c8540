"""Replaced-token detection: the stock losses of each document, what is sampled, what trains what."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from lmssl.data.batch import SequenceBatch
from lmssl.model import products
from lmssl.model.build import build_config, build_model
from lmssl.model.electra import ElectraPair
from lmssl.model.head import IGNORE
from lmssl.objective.base import MicroBatch
from lmssl.objective.masking import Masking
from lmssl.objective.module import LossModule
from lmssl.objective.replaced import ReplacedObjective
from lmssl.recipe.model import ModelSection
from lmssl.recipe.objective import ReplacedObjective as Section
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.tokenizer.offsets import surface_bytes
from sequences import packed, segments_of

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LENGTH = 40
STEPS = 120
ROWS = ([12, 20, 5], [LENGTH], [9, 30], [], [38], [3, 30])


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Tokenizer:
    return load_tokenizer(root / "tokenizer/wordpiece-8k")


@pytest.fixture(scope="module")
def objective(tokenizer: Tokenizer) -> ReplacedObjective:
    section = Section(kind="replaced", rate=0.3, mask_share=0.8, random_share=0.1)
    return ReplacedObjective(Masking.of(section, tokenizer, 7, 1000), surface_bytes(tokenizer))


@pytest.fixture
def model(tokenizer: Tokenizer) -> ElectraPair:
    section = TypeAdapter(ModelSection).validate_python({"kind": "electra", "embedding_size": 16, **SIZES})
    config = build_config(section, vocab_size=8192, sequence_length=LENGTH, tokenizer=tokenizer, objective="replaced")
    found = build_model(config, objective="replaced", seed=1, generator_ratio=0.5)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    assert isinstance(found, ElectraPair)
    return found


def batch(*rows: list[int], position: int = 0) -> SequenceBatch:
    """Random tokens of text between [CLS] (2) and [SEP] (3)."""
    found = packed(*rows, length=LENGTH, first=5, vocab_size=8000, position=position)
    for row, _, place in segments_of(found):
        found.ids_BT[row, place[0]], found.ids_BT[row, place[-1]] = 2, 3
    return found


def run(model: ElectraPair, objective: ReplacedObjective, micro: MicroBatch) -> tuple[dict[str, Tensor], Tensor]:
    """The sums, and what the discriminator read."""
    seen: list[Tensor] = []

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"])

    hook = model.discriminator.electra.register_forward_pre_hook(look, with_kwargs=True)
    sums = LossModule(model, objective, bf16=False)(micro.inputs)
    hook.remove()
    return sums, seen[0]


def test_losses_are_the_stock_ones_of_each_document(model: ElectraPair, objective: ReplacedObjective) -> None:
    rows = batch(*ROWS)
    micro = objective.prepare(rows)
    sums, filled = run(model, objective, micro)
    detector = ElectraForPreTraining._from_config(model.discriminator.config, attn_implementation="eager")
    generator = ElectraForMaskedLM._from_config(model.generator.config, attn_implementation="eager")
    detector.load_state_dict(model.discriminator.state_dict())
    generator.load_state_dict(model.generator.state_dict())
    labels = torch.where(micro.inputs["slots_BT"] < 0, IGNORE, micro.inputs["original_BT"])
    original = torch.from_numpy(rows.ids_BT)
    masked, replaced, right, found = torch.zeros(()), torch.zeros(()), 0, 0
    for row, _, place in segments_of(rows):
        wanted, ids = labels[row][place][None], micro.inputs["ids_BT"][row][place][None]
        if (wanted != IGNORE).any():
            out = generator(input_ids=ids, labels=wanted)
            masked = masked + out.loss * (wanted != IGNORE).sum()
            right += int(((out.logits.argmax(-1) == wanted) & (wanted != IGNORE)).sum())
        changed = (filled[row][place] != original[row][place])[None].long()
        out = detector(input_ids=filled[row][place][None], labels=changed)
        replaced = replaced + out.loss * len(place)
        found += int(((out.logits > 0) == (changed > 0)).sum())
    torch.testing.assert_close(sums["masked"], masked, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums["replaced"], replaced, rtol=1e-5, atol=1e-4)
    assert (int(sums["accuracy"]), int(sums["detection_accuracy"])) == (right, found)
    assert int(sums["replaced_ratio"]) == int((filled != original).sum()) > 20
    (masked + 50 * replaced).backward()
    (sums["masked"] + 50 * sums["replaced"]).backward()
    parts = {"discriminator": dict(detector.named_parameters()), "generator": dict(generator.named_parameters())}
    for name, parameter in model.named_parameters():
        which, _, inner = name.partition(".")
        expected = parts[which][inner].grad
        if inner.startswith("electra.embeddings."):  # both models' embedding
            expected = parts["discriminator"][inner].grad + parts["generator"][inner].grad
        got = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        wanted = torch.zeros_like(parameter) if expected is None else expected
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()) + 1e-5, msg=name)


def test_counts_are_of_targets_and_of_text(objective: ReplacedObjective) -> None:
    rows = batch(*ROWS)
    micro = objective.prepare(rows)
    targets, text = int((micro.inputs["targets_BC"] != IGNORE).sum()), int((rows.segments_BT > 0).sum())
    assert micro.counts == {
        "masked": targets,
        "accuracy": targets,
        "replaced": text,
        "detection_accuracy": text,
        "replaced_ratio": text,
    }
    assert targets == pytest.approx(0.3 * (text - 18), abs=6)
    assert micro.num_padding_tokens == rows.ids_BT.size - text
    assert int((micro.inputs["slots_BT"] >= 0).sum()) == targets
    assert objective.weights == {"masked": 1.0, "replaced": 50.0}


def test_only_targets_are_filled(model: ElectraPair, objective: ReplacedObjective) -> None:
    rows = batch(*ROWS)
    micro = objective.prepare(rows)
    _, filled = run(model, objective, micro)
    kept = micro.inputs["slots_BT"] < 0
    assert filled[kept].equal(torch.from_numpy(rows.ids_BT)[kept])  # random tokens of the masking are gone, too
    assert (filled[~kept] != torch.from_numpy(rows.ids_BT)[~kept]).float().mean() > 0.9


def test_samples_do_not_depend_on_the_micro_batch(model: ElectraPair, objective: ReplacedObjective) -> None:
    whole = objective.prepare(batch(*ROWS[:3]))
    sums, filled = run(model, objective, whole)
    parts = []
    for row in range(3):
        rows = batch(*ROWS[:3])
        cut = SequenceBatch(**{f.name: getattr(rows, f.name)[row : row + 1] for f in dataclasses.fields(rows)})
        parts.append(run(model, objective, objective.prepare(cut)))
    assert torch.cat([ids for _, ids in parts]).equal(filled)
    for name, total in sums.items():
        torch.testing.assert_close(torch.stack([s[name] for s, _ in parts]).sum(), total, rtol=1e-5, atol=1e-4)


def test_samples_are_new_at_another_position_and_in_evaluation(
    model: ElectraPair, objective: ReplacedObjective
) -> None:
    rows = batch([LENGTH], [LENGTH])
    rows.ids_BT[1] = rows.ids_BT[0]
    first, again = (objective.prepare(rows) for _ in range(2))
    held_out = objective.prepare(rows, evaluation=True)
    keys = first.inputs["keys_BC2"]
    assert keys.equal(again.inputs["keys_BC2"])
    assert int(keys.min()) >= 0 and int(keys.max()) < 2**31 and len(keys.flatten().unique()) == keys.numel()
    assert not held_out.inputs["keys_BC2"].equal(keys[:, : held_out.inputs["keys_BC2"].shape[1]])
    other = dataclasses.replace(objective, masking=dataclasses.replace(objective.masking, seed=8)).prepare(rows)
    assert not other.inputs["keys_BC2"].equal(keys)


def test_each_loss_trains_its_own_model(model: ElectraPair, objective: ReplacedObjective) -> None:
    """No gradient comes to the generator through its samples; the embeddings hear from both."""
    micro = objective.prepare(batch(*ROWS))
    for term, idle in (("masked", "discriminator."), ("replaced", "generator.")):
        model.zero_grad()
        run(model, objective, micro)[0][term].backward()
        for name, parameter in model.named_parameters():
            moved = parameter.grad is not None and bool((parameter.grad != 0).any())
            if ".embeddings." in name:
                assert moved
            elif name.startswith(idle):
                assert not moved, name


def test_it_compiles_as_one_graph_for_all_batches(
    model: ElectraPair, objective: ReplacedObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_compile", lambda function: function)  # tested with the compiler on its own
    core = LossModule(model, objective, bf16=False)
    first, second = (objective.prepare(batch(*rows)) for rows in (ROWS, tuple(reversed(ROWS))))
    compiled = torch.compile(core, backend="aot_eager", fullgraph=True, dynamic=False)
    graphs, counted = torch._dynamo.utils.counters["stats"], []
    for micro in (first, second):
        ours, plain = compiled(micro.inputs), core(micro.inputs)
        for name in plain:
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-5, atol=1e-4)
        counted.append(graphs["unique_graphs"])
    assert counted[0] == counted[1]
    (ours["masked"] + ours["replaced"]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_batch_without_text_is_harmless(model: ElectraPair, objective: ReplacedObjective) -> None:
    micro = objective.prepare(batch([], []))
    assert set(micro.counts.values()) == {0} and micro.num_bytes == 0.0
    sums, _ = run(model, objective, micro)
    assert all(float(value.detach()) == 0.0 for value in sums.values())
    (sums["masked"] + sums["replaced"]).backward()
    assert all(p.grad is None or (torch.isfinite(p.grad).all() and (p.grad == 0).all()) for p in model.parameters())


def test_it_travels_and_one_stream_is_one_document(objective: ReplacedObjective) -> None:
    rows = batch(*ROWS)
    there = pickle.loads(pickle.dumps(objective))
    assert there.prepare(rows).inputs["keys_BC2"].equal(objective.prepare(rows).inputs["keys_BC2"])
    one_stream = dataclasses.replace(objective, document_attention=False).prepare(rows)
    assert one_stream.inputs["offsets_BT"][0].tolist() == list(range(LENGTH))
    assert np.array_equal(one_stream.inputs["original_BT"].numpy(), rows.ids_BT)


def test_it_learns(model: ElectraPair, objective: ReplacedObjective) -> None:
    """Texts that count upwards: what breaks the count is found more often than by calling everything original."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    random, shares = np.random.default_rng(0), []
    for step in range(STEPS):
        rows = batch(*([[LENGTH]] * 16), position=16 * step)
        counts = 100 + (random.integers(0, 40, (16, 1)) + np.arange(LENGTH - 2)) % 40
        rows.ids_BT[:, 1:-1] = counts
        micro = objective.prepare(rows)
        sums, _ = run(model, objective, micro)
        loss = sum(weight * sums[term] / micro.counts[term] for term, weight in objective.weights.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found, replaced = (float(sums[name]) / micro.counts[name] for name in ("detection_accuracy", "replaced_ratio"))
        shares.append((found, 1 - replaced))
    found, original = np.mean(shares[-20:], axis=0)
    assert original < 0.9 and found > original + 0.01
