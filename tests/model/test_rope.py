"""Another base in a model that exists: the same as a model built with it, in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmssl.model.build import build_config, build_model
from lmssl.model.rope import rope_theta, set_rope_theta
from lmssl.recipe.encoders import EuroBertModel, ModernBertModel
from lmssl.recipe.model import LlamaModel, Qwen3Model

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
FAMILIES: dict[str, tuple[Any, str, str]] = {
    "llama": (LlamaModel, "rope_theta", "causal"),
    "qwen3": (Qwen3Model, "rope_theta", "causal"),
    "eurobert": (EuroBertModel, "rope_theta", "masked"),
    "modernbert": (ModernBertModel, "global_rope_theta", "masked"),
}


def built(kind: str, theta: float) -> Any:
    family, field, objective = FAMILIES[kind]
    section = family(kind=kind, **SIZES, **{field: theta})
    config = build_config(section, objective=objective, vocab_size=64, sequence_length=64, tokenizer=None)
    return build_model(config, objective=objective, seed=1).eval()


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_equals_a_model_built_with_the_base(kind: str) -> None:
    model, wanted = built(kind, 10_000.0), built(kind, 80_000.0)
    places = {name: tensor.data_ptr() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert rope_theta(model) == 10_000.0
    ids_BT = torch.arange(48)[None]
    with torch.no_grad():
        before, target = model.base_model(ids_BT)[0], wanted.base_model(ids_BT)[0]
        set_rope_theta(model, 80_000.0)
        after = model.base_model(ids_BT)[0]
    assert torch.equal(after, target) and not torch.equal(before, target)
    assert rope_theta(model) == 80_000.0
    assert model.config.to_dict() == wanted.config.to_dict()
    assert {n: t.data_ptr() for n, t in (*model.named_parameters(), *model.named_buffers())} == places
    ours, theirs = dict(model.named_buffers()), dict(wanted.named_buffers())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_local_layers_keep_their_base() -> None:
    model = built("modernbert", 10_000.0)
    before = {name: tensor.clone() for name, tensor in model.named_buffers() if "sliding" in name}
    set_rope_theta(model, 160_000.0)
    assert before and all(torch.equal(dict(model.named_buffers())[name], tensor) for name, tensor in before.items())
    assert model.config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's import
def test_compiled_code_sees_the_change() -> None:
    model, ids_BT = built("llama", 10_000.0), torch.arange(48)[None]
    compiled = torch.compile(model.base_model, dynamic=False)
    with torch.no_grad():
        before = compiled(ids_BT, use_cache=False)[0]
        set_rope_theta(model, 80_000.0)
        after, wanted = compiled(ids_BT, use_cache=False)[0], model.base_model(ids_BT, use_cache=False)[0]
    torch.testing.assert_close(after, wanted)
    assert not torch.allclose(before, wanted)
