"""Micro-batches cut at their longest row: the same sums and gradients from fewer columns, for every objective."""

from __future__ import annotations

import pickle

import pytest
import torch

from lmssl.model.build import build_config, build_recipe_model
from lmssl.objective.base import MicroBatch, SumObjective, Unpadded
from lmssl.objective.build import build_objective
from lmssl.objective.module import LossModule
from lmssl.recipe.load import load_recipe
from lmssl.shipped import shipped_root
from lmssl.tokenizer.load import load_tokenizer
from sequences import packed

LENGTH = 256
ROWS = ([90], [41], [3], [17, 60])
NAMES = [
    "gpt-llama",
    "masked-bert",
    "masked-modernbert",
    "prefix-llama",
    "hybrid-llama",
    "replaced-electra",
    "sentence-bert",
]


def results(module: LossModule, micro: MicroBatch) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    module.zero_grad()
    objective = module.objective
    assert isinstance(objective, SumObjective)
    sums = module(micro.inputs)
    torch.stack([sums[term] for term in objective.weights]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in sums.items()}, gradients


@pytest.mark.parametrize("name", NAMES)
def test_sums_and_gradients_are_those_of_padded_rows(name: str) -> None:
    changes = [f"data.sequence_length={LENGTH}", f"train.batch_tokens={LENGTH * 8}"]
    recipe = load_recipe(shipped_root() / f"recipes/debug/{name}.yaml", changes).recipe
    tokenizer = load_tokenizer(shipped_root() / recipe.tokenizer.path)
    objective = build_objective(recipe, tokenizer, num_positions=100)
    assert isinstance(objective, SumObjective)
    kind = recipe.objective.kind
    config = build_config(
        recipe.model,
        vocab_size=recipe.vocab_size(tokenizer.num_tokens),
        sequence_length=LENGTH,
        tokenizer=tokenizer,
        objective=kind,
    )
    batch = packed(*ROWS, length=LENGTH, first=10, vocab_size=1000)
    prepare = pickle.loads(pickle.dumps(Unpadded(objective)))  # as loader workers get it
    padded, unpadded = objective.prepare(batch), prepare(batch)
    assert unpadded.inputs["ids_BT"].shape == (4, 128)  # 90 in whole blocks of 64
    assert (unpadded.counts, unpadded.num_bytes) == (padded.counts, padded.num_bytes)
    assert unpadded.num_padding_tokens == padded.num_padding_tokens == 4 * LENGTH - 211
    module = LossModule(build_recipe_model(recipe, config), objective, bf16=False).eval()
    torch.manual_seed(0)
    wanted, gradients = results(module, padded)
    torch.manual_seed(0)
    got, found = results(module, unpadded)
    assert got == pytest.approx(wanted, rel=1e-5)
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item() + 1e-6)


def test_full_rows_and_empty_ones_keep_a_shape() -> None:
    recipe = load_recipe(shipped_root() / "recipes/debug/gpt-llama.yaml").recipe
    objective = build_objective(recipe, load_tokenizer(shipped_root() / recipe.tokenizer.path), num_positions=100)
    assert Unpadded(objective)(packed([96], [5], length=96)).inputs["ids_BT"].shape == (2, 96)
    assert Unpadded(objective)(packed([], [], length=96)).inputs["ids_BT"].shape == (2, 64)


def test_rows_of_an_encoder_and_a_decoder_stay() -> None:
    recipe = load_recipe(shipped_root() / "recipes/debug/span-t5.yaml").recipe
    objective = build_objective(recipe, load_tokenizer(shipped_root() / recipe.tokenizer.path), num_positions=100)
    batch = packed([60], [20], length=recipe.data.sequence_length, first=200, vocab_size=1000)
    shapes = {name: tensor.shape for name, tensor in objective.prepare(batch).inputs.items()}
    assert {name: tensor.shape for name, tensor in Unpadded(objective)(batch).inputs.items()} == shapes
