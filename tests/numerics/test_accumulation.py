"""A batch of masked rows in one, two and four micro-batches: the loss and gradients of one stock forward over all."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from kinds import MASKED
from lmssl.data.batch import SequenceBatch
from lmssl.model.build import build_config, build_model
from lmssl.model.head import IGNORE
from lmssl.objective.base import MicroBatch
from lmssl.objective.masked import MaskedObjective
from lmssl.objective.masking import Masking
from lmssl.objective.module import LossModule
from lmssl.recipe.model import FAMILIES
from lmssl.recipe.objective import MaskedObjective as Section
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.tokenizer.offsets import surface_bytes
from lmssl.train.agree import Agreement
from lmssl.train.backend import Replicated
from lmssl.train.phases import Phases
from lmssl.train.step import Measured, train_step
from sequences import packed

LENGTHS = [40, 38, 36, 33, 3, 20, 4, 2]
"""One document a row; the halves, and the quarters more so, have very different numbers of targets."""


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Tokenizer:
    return load_tokenizer(root / "tokenizer/wordpiece-8k")


@pytest.fixture(scope="module")
def objective(tokenizer: Tokenizer) -> MaskedObjective:
    return MaskedObjective(Masking.of(Section(kind="masked"), tokenizer, 7, 1000), surface_bytes(tokenizer))


@pytest.fixture(scope="module", params=["bert", "modernbert"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> PreTrainedModel:
    section = FAMILIES[request.param].model_validate({"kind": request.param, **MASKED[request.param]})
    config = build_config(section, objective="masked", vocab_size=8192, sequence_length=40, tokenizer=tokenizer)
    return build_model(config, objective="masked", seed=1).train()


def rows(start: int, end: int) -> SequenceBatch:
    """Some rows of the batch, as they stand in it."""
    whole = packed(*([length] for length in LENGTHS), length=40, first=100, vocab_size=8000)
    names = ("ids_BT", "segments_BT", "offsets_BT", "positions_B", "num_bytes_B")
    return SequenceBatch(*(getattr(whole, name)[start:end] for name in names))


def stepped(
    model: PreTrainedModel, objective: MaskedObjective, parts: list[MicroBatch]
) -> tuple[Measured, dict[str, torch.Tensor]]:
    """One step from these micro-batches, and its gradients: AdamW's first moment is a tenth of them."""
    module = LossModule(copy.deepcopy(model), objective, bf16=False).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    optimizer.param_groups[0]["peak_lr"] = 1e-3
    backend = Replicated(module, Accelerator(cpu=True), lambda: optimizer)
    agreement = Agreement(lambda: False, lambda: 0.0)
    measured = train_step(
        *(backend, objective, parts),
        lr_ratio=1.0,
        max_grad_norm=None,
        seed=1,
        step=0,
        agreement=agreement,
        phases=Phases(),
    )
    assert measured is not None
    named = module.model.named_parameters()
    return measured, {name: optimizer.state[p]["exp_avg"] / 0.1 for name, p in named if p in optimizer.state}


def stock_loss(model: PreTrainedModel, micro: MicroBatch) -> torch.Tensor:
    """What the class itself returns: the mean over the rows' targets."""
    stock = model
    stock.set_attn_implementation("sdpa")
    labels = torch.full_like(micro.inputs["ids_BT"], IGNORE)
    rows_N, slots_N = (micro.inputs["targets_BC"] != IGNORE).nonzero(as_tuple=True)
    labels[rows_N, micro.inputs["places_BC"][rows_N, slots_N]] = micro.inputs["targets_BC"][rows_N, slots_N]
    inputs = {"input_ids": micro.inputs["ids_BT"], "attention_mask": (micro.inputs["segments_BT"] > 0).long()}
    loss: torch.Tensor = stock(**inputs, labels=labels).loss
    return loss


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_unequal_micro_batches_are_one_batch(parts: int, model: PreTrainedModel, objective: MaskedObjective) -> None:
    """The classes' own losses are means over each micro-batch, which weigh a target more the fewer there are.

    Averaged over micro-batches they are another number, and since transformers' Trainer takes them for sums over
    `num_items_in_batch` (`BertForMaskedLM` accepts and ignores it), it does not even divide by their number.
    """
    size = len(LENGTHS) // parts
    micro_batches = [objective.prepare(rows(start, start + size)) for start in range(0, len(LENGTHS), size)]
    counts = [micro.counts["masked"] for micro in micro_batches]
    assert parts == 1 or max(counts) > 4 * max(1, min(counts))
    measured, gradients = stepped(model, objective, micro_batches)
    whole = copy.deepcopy(model)
    wanted = stock_loss(whole, objective.prepare(rows(0, len(LENGTHS))))
    wanted.backward()
    wanted = wanted.detach()
    loss = float(measured.sums["masked"] / measured.counts["masked"])
    assert loss == pytest.approx(float(wanted), rel=1e-6)
    assert int(measured.counts["masked"]) == sum(counts)
    for name, parameter in whole.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6)
    if parts > 1:
        with torch.no_grad():
            means = [float(stock_loss(whole, micro)) for micro in micro_batches if micro.counts["masked"]]
        assert abs(np.mean(means) - float(wanted)) > 1e-3
