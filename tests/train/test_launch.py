"""Which parts of a model are compiled layer by layer."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import ElectraConfig

from kinds import tiny
from lmssl.model.build import build_model
from lmssl.train.launch import compile_module


def compiled_parts(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what `compile_module` hands to the compiler."""
    names, found = {part: name for name, part in model.named_modules()}, []
    monkeypatch.setattr(nn.Module, "compile", lambda part, **_: found.append(names[part]))
    compile_module(model, "layers")
    return found


@pytest.mark.parametrize(
    ("kind", "objective", "stacks"),
    [
        ("llama", "causal", ["model.layers"]),
        ("bert", "masked", ["bert.encoder.layer"]),
        ("t5", "span", ["encoder.block", "decoder.block"]),
    ],
)
def test_every_layer_is_compiled(kind: str, objective: str, stacks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiled_parts(tiny(kind, objective=objective), monkeypatch)
    assert found == [f"{stack}.{number}" for stack in stacks for number in range(2)]


def test_generator_and_discriminator_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = ElectraConfig(vocab_size=50, embedding_size=16, **sizes)
    model = build_model(config, objective="replaced", seed=1, generator_ratio=0.5, device="meta")
    found = compiled_parts(model, monkeypatch)
    stacks = ("discriminator.electra.encoder.layer", "generator.electra.encoder.layer")
    assert found == [f"{stack}.{number}" for stack in stacks for number in range(3)]
