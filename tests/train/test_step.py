"""The step in its two shapes, on toy objectives: global counts, gradient caching, the gated update."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from lmssl.data.batch import SequenceBatch
from lmssl.objective.base import EmbeddingObjective, MicroBatch, SumObjective
from lmssl.objective.module import LossModule
from lmssl.train.agree import Agreement
from lmssl.train.backend import Replicated
from lmssl.train.guard import Limits
from lmssl.train.phases import Phases
from lmssl.train.step import Measured, train_step

LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=True,
)


class TwoTerms(SumObjective):
    """Next tokens, and a second loss at fewer places: targets above a threshold must have a small first feature."""

    weights: ClassVar[Mapping[str, float]] = {"next": 1.0, "small": 0.5}

    def prepare(self, batch: SequenceBatch) -> MicroBatch:
        raise AssertionError("the tests make micro-batches themselves")

    def sums(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = model.base_model(input_ids=inputs["ids_BT"], use_cache=False).last_hidden_state
        logits = (hidden @ model.get_output_embeddings().weight.t()).flatten(0, 1)
        targets = inputs["targets_BT"].flatten()
        chosen = (targets > 40).float()
        return {
            "next": F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"),
            "small": (hidden.flatten(0, 1)[:, 0].square() * chosen).sum(),
        }


class Contrast(EmbeddingObjective):
    """Rows 2i and 2i+1 belong together; InfoNCE over the whole batch."""

    seen: ClassVar[list[Tensor]] = []

    def prepare(self, batch: SequenceBatch) -> MicroBatch:
        raise AssertionError("the tests make micro-batches themselves")

    def embed(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        hidden = model.base_model(input_ids=inputs["ids_BT"], use_cache=False).last_hidden_state
        embedding = F.normalize(hidden.mean(1), dim=-1)
        self.seen.append(embedding.detach())
        return embedding

    def loss(self, embeddings: Tensor) -> Tensor:
        similarity = (embeddings @ embeddings.t() / 0.2).masked_fill(torch.eye(len(embeddings), dtype=torch.bool), -1e9)
        partner = torch.arange(len(embeddings)) ^ 1
        return F.cross_entropy(similarity, partner)


def rows(number: int, targets_per_row: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 50, (number, 12), generator=torch.Generator().manual_seed(number))
    targets = torch.full_like(ids, -100)
    for row, count in enumerate(targets_per_row):
        targets[row, :count] = ids[row, 1 : count + 1]
    return ids, targets


def micro(ids: Tensor, targets: Tensor) -> MicroBatch:
    counts = {"next": int((targets != -100).sum()), "small": int((targets > 40).sum())}
    return MicroBatch(
        {"ids_BT": ids, "targets_BT": targets}, counts, num_bytes=float(ids.numel()), num_padding_tokens=1
    )


def built(
    config: LlamaConfig | GPT2Config, objective: SumObjective | EmbeddingObjective
) -> tuple[LossModule, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    module = LossModule(model, objective, bf16=False).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1.0, fused=True)
    optimizer.param_groups[0]["peak_lr"] = 1.0
    return module, optimizer


def step(
    module: LossModule,
    optimizer: torch.optim.Optimizer,
    parts: list[MicroBatch],
    *,
    clip: float | None = None,
    limits: Limits | None = None,
) -> Measured:
    measured = try_step(module, optimizer, parts, clip=clip, limits=limits)
    assert measured is not None
    return measured


def try_step(
    module: LossModule,
    optimizer: torch.optim.Optimizer,
    parts: list[MicroBatch],
    *,
    clip: float | None = None,
    limits: Limits | None = None,
    stop_at: int = 1000,
) -> Measured | None:
    """`stop_at`: the question, from 0, at which the ranks agree to stop."""
    asked = iter(range(10**6))
    return train_step(
        Replicated(module, Accelerator(cpu=True), lambda: optimizer),
        module.objective,
        parts,
        lr_ratio=1e-2,
        max_grad_norm=clip,
        seed=7,
        step=0,
        agreement=Agreement(lambda: next(asked) >= stop_at, lambda: 0.0),
        phases=Phases(),
        limits=limits,
    )


def gradients_seen(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """AdamW's first moment after one step from zero is (1 - beta1) x gradient."""
    return [optimizer.state[p]["exp_avg"] / 0.1 for g in optimizer.param_groups for p in g["params"]]


def test_micro_batches_of_unequal_targets_add_up_to_one_big_batch() -> None:
    objective = TwoTerms()
    ids, targets = rows(6, [11, 1, 0, 5, 3, 9])
    module, optimizer = built(LLAMA, objective)
    reference = copy.deepcopy(module)
    measured = step(module, optimizer, [micro(ids[a:b], targets[a:b]) for a, b in ((0, 3), (3, 5), (5, 6))])
    sums = objective.sums(reference.model, {"ids_BT": ids, "targets_BT": targets})
    loss = sums["next"] / 29 + 0.5 * sums["small"] / max(1, int((targets > 40).sum()))
    wanted = torch.autograd.grad(loss, list(reference.parameters()))
    for got, expected in zip(gradients_seen(optimizer), wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    assert int(measured.counts["next"]) == 29
    torch.testing.assert_close(measured.sums["next"], sums["next"], rtol=1e-5, atol=0)
    assert (float(measured.num_bytes), int(measured.num_padding_tokens)) == (72.0, 3)
    torch.testing.assert_close(measured.loss, loss.detach())


def test_mean_of_means_would_differ_here() -> None:
    """The check above is one that the usual mistake fails."""
    objective = TwoTerms()
    ids, targets = rows(6, [11, 1, 0, 5, 3, 9])
    module, _ = built(LLAMA, objective)
    parts = [
        objective.sums(module.model, {"ids_BT": ids[a:b], "targets_BT": targets[a:b]}) for a, b in ((0, 3), (3, 6))
    ]
    means = (parts[0]["next"] / 12 + parts[1]["next"] / 17) / 2
    whole = (parts[0]["next"] + parts[1]["next"]) / 29
    assert abs(float((means - whole).detach())) > 1e-3


def test_a_batch_without_targets_is_harmless() -> None:
    ids, targets = rows(2, [0, 0])
    module, optimizer = built(LLAMA, TwoTerms())
    before = copy.deepcopy(module.state_dict())
    measured = step(module, optimizer, [micro(ids, targets)])
    assert float(measured.finite) == 1.0
    assert float(measured.grad_norm) == 0.0
    # AdamW with zero gradients moves by weight decay alone.
    weight = "model.model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(module.state_dict()[weight], before[weight] * (1 - 1e-2 * 1e-2))


def test_embeddings_of_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    objective = Contrast()
    ids, targets = rows(8, [])
    module, optimizer = built(LLAMA, objective)
    reference = copy.deepcopy(module)
    measured = step(module, optimizer, [micro(ids[a:b], targets[a:b]) for a, b in ((0, 3), (3, 4), (4, 8))])
    loss = objective.loss(objective.embed(reference.model, {"ids_BT": ids}))
    wanted = torch.autograd.grad(loss, list(reference.parameters()))
    for got, expected in zip(gradients_seen(optimizer), wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(measured.sums["loss"], loss.detach())


def test_gradient_caching_replays_dropout() -> None:
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.0)
    ids, targets = rows(4, [])
    module, optimizer = built(config, Contrast())
    Contrast.seen.clear()
    step(module, optimizer, [micro(ids[:2], targets[:2]), micro(ids[2:], targets[2:])])
    first, second, first_again, second_again = Contrast.seen
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_leaves_weights_and_optimizer_alone(poison: float) -> None:
    ids, targets = rows(2, [5, 5])
    module, optimizer = built(LLAMA, TwoTerms())
    step(module, optimizer, [micro(ids, targets)])
    weights = copy.deepcopy(module.state_dict())
    states = copy.deepcopy(optimizer.state_dict()["state"])
    norm = module.model.model.norm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(poison)
    measured = step(module, optimizer, [micro(ids, targets)])
    with torch.no_grad():
        norm.copy_(kept)
    assert float(measured.finite) == 0.0
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, states[number][key]), key


def test_clipping_scales_the_whole_gradient() -> None:
    ids, targets = rows(2, [5, 5])
    found = []
    for clip in (None, 0.01):
        module, optimizer = built(LLAMA, TwoTerms())
        measured = step(module, optimizer, [micro(ids, targets)], clip=clip)
        found.append((float(measured.grad_norm), gradients_seen(optimizer)))
    (norm, free), (same_norm, clipped) = found
    assert norm == same_norm > 0.01
    for a, b in zip(free, clipped, strict=True):
        torch.testing.assert_close(a * (0.01 / norm), b, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("damage", [None, torch.nan, torch.inf])
def test_clipping_is_torchs_bit_for_bit(damage: float | None) -> None:
    """Where gradients are short enough they are left alone, as torch does by 1.0; the limits are next to the norm."""
    module, optimizer = built(LLAMA, TwoTerms())
    backend = Replicated(module, Accelerator(cpu=True), lambda: optimizer)
    parameters = list(module.parameters())
    drawn = [torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) for p in parameters]
    if damage is not None:
        drawn[3].view(-1)[1] = damage
    size = float(torch.stack([x.norm() for x in drawn]).norm().nan_to_num(1.0, posinf=1.0))
    limits = [] if damage is not None else [None]  # without a limit torch makes all of them NaN where one is
    for limit in (*limits, 0.5 * size, *(size + 1e-6 + part * 1e-6 * size for part in (-1, 0, 1)), 2 * size):
        found = []
        for clip in (backend.clip, lambda limit: torch.nn.utils.clip_grad_norm_(parameters, limit or float("inf"))):
            for parameter, gradient in zip(parameters, drawn, strict=True):
                parameter.grad = gradient.clone()
            found.append([clip(limit).clone(), *(p.grad for p in parameters)])
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
            assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("objective", [TwoTerms, Contrast])
@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_a_stop_drops_what_was_accumulated(objective: type[TwoTerms | Contrast], stop_at: int) -> None:
    """Asked before the step and before each micro-batch; the next step is as if this one had not been tried."""
    ids, targets = rows(4, [5, 5, 2, 1])
    parts = [micro(ids[:2], targets[:2]), micro(ids[2:], targets[2:])]
    module, optimizer = built(LLAMA, objective())
    reference, other = built(LLAMA, objective())
    assert try_step(module, optimizer, parts, stop_at=stop_at) is None
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not optimizer.state
    step(module, optimizer, parts)
    step(reference, other, parts)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name


def test_a_step_above_its_limits_changes_nothing() -> None:
    ids, targets = rows(2, [5, 5])
    module, optimizer = built(LLAMA, TwoTerms())
    weights = copy.deepcopy(module.state_dict())
    seen = step(module, optimizer, [micro(ids, targets)], limits=Limits(loss=0.1))
    norm = float(seen.grad_norm)
    assert float(seen.finite) == 0.0
    assert float(step(module, optimizer, [micro(ids, targets)], limits=Limits(grad_norm=0.99 * norm)).finite) == 0.0
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    within = Limits(loss=float(seen.loss) * 1.01, grad_norm=1.01 * norm)
    assert float(step(module, optimizer, [micro(ids, targets)], limits=within).finite) == 1.0
    assert not all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
