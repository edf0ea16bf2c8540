"""The last layer at the places that are asked for, against the whole layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kinds import PAD, VOCAB, tiny
from lmssl.model.encoder import MASKED_KINDS, encode, masked_head
from lmssl.model.last_layer import chooses
from lmssl.model.layers import at_places, recompute_layers

PLACES = torch.tensor([[1, 4, 9, 20, 0, 0]])
"""The last two stand for no target, as where a sequence has fewer than the rest."""


LENGTHS = (5, 17, 1, 9)


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, segments and offsets of one sequence of four documents and two tokens of padding."""
    ids = torch.randint(8, VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(LENGTHS)])[None]
    offsets = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return F.pad(ids, (0, 2), value=PAD), F.pad(segments, (0, 2)), F.pad(offsets, (0, 2))


def loss(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    head = masked_head(model)
    logits = head.transform(hidden.flatten(0, 1)) @ head.weight_VD.T
    return F.cross_entropy(logits, torch.tensor([11, 12, 13, 14, -100, -100]))


@pytest.mark.parametrize(
    ("kind", "recomputed"), [*((kind, False) for kind in MASKED_KINDS), ("bert", True), ("modernbert", True)]
)
def test_losses_and_gradients_are_those_of_the_whole_layer(kind: str, recomputed: bool) -> None:
    whole, chosen = tiny(kind), tiny(kind)
    assert chooses(chosen)
    if recomputed:
        recompute_layers(chosen, 1)
        chosen.train()
        whole.train()
    ids, segments, offsets = packed()
    everywhere = encode(whole, ids, segments, offsets)
    there = encode(chosen, ids, segments, offsets, places_BC=PLACES)
    assert there.shape == (1, 6, everywhere.shape[-1])
    torch.testing.assert_close(there, at_places(everywhere, PLACES), rtol=1e-5, atol=1e-6)
    assert torch.equal(encode(chosen, ids, segments, offsets), everywhere)
    wanted, found = loss(whole, at_places(everywhere, PLACES)), loss(chosen, there)
    wanted.backward()
    found.backward()
    for (name, a), (_, b) in zip(whole.named_parameters(), chosen.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is None or b.grad is None:  # the head's bias, which these logits leave out
            continue
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["bert", "modernbert", "eurobert", "distilbert"])
def test_what_follows_attention_sees_the_places_alone(kind: str) -> None:
    model = tiny(kind)
    seen: list[tuple[int, ...]] = []
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[:2])))
    ids, segments, offsets = packed()
    encode(model, ids, segments, offsets, places_BC=PLACES)
    assert seen[-1] == (1, 6) and seen[0] == tuple(ids.shape)
    assert seen.count((1, 6)) >= 2


def test_a_copy_has_weights_of_its_own() -> None:
    model = tiny("bert")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    inputs = packed()
    assert torch.equal(encode(copied, *inputs, places_BC=PLACES), encode(tiny("bert"), *inputs, places_BC=PLACES))


def test_a_model_that_does_not_know_places_is_asked_everywhere() -> None:
    model = tiny("bert")
    layer = model.base_model.encoder.layer[-1]
    layer.forward, layer.reads_places = type(layer).forward.__get__(layer), False
    ids, segments, offsets = packed()
    there = encode(model, ids, segments, offsets, places_BC=PLACES)
    torch.testing.assert_close(there, encode(tiny("bert"), ids, segments, offsets, places_BC=PLACES))
