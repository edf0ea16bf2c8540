"""ELECTRA's two models as one, and the tokens that the generator draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from lmssl.model.build import build_model
from lmssl.model.electra import ElectraPair, generator_config, sampled_tokens
from lmssl.recipe.encoders import generator_sizes

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def pair(**change: Any) -> ElectraPair:
    config = ElectraConfig(vocab_size=101, embedding_size=16, **SIZES, **change)
    found = build_model(config, objective="replaced", seed=1, generator_ratio=0.5)
    assert isinstance(found, ElectraPair)
    return found


def keys(count: int) -> torch.Tensor:
    return torch.randint(0, 2**31, (count, 2), generator=torch.Generator().manual_seed(5))


def test_each_weight_is_there_once() -> None:
    model = pair()
    names = [name for name, _ in model.named_parameters()]
    assert type(model.discriminator) is ElectraForPreTraining and type(model.generator) is ElectraForMaskedLM
    assert not any(name.startswith("generator.electra.embeddings.") for name in names)
    assert "generator.generator_lm_head.weight" not in names and "generator.generator_lm_head.bias" in names
    assert sum(p.numel() for p in model.parameters()) == model.num_parameters()
    own = sum(p.numel() for p in model.generator.parameters())
    shared = sum(p.numel() for p in model.discriminator.electra.embeddings.parameters())
    assert model.num_parameters() == model.discriminator.num_parameters() + own - shared


def test_an_untied_head_has_a_matrix_of_its_own() -> None:
    names = [name for name, _ in pair(tie_word_embeddings=False).named_parameters()]
    assert "generator.generator_lm_head.weight" in names
    assert not any(name.startswith("generator.electra.embeddings.") for name in names)


def test_weights_depend_on_the_seed_alone() -> None:
    first, again = pair(), pair()
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("sizes", "ratio", "expected"),
    [
        ((256, 4, 1024), 0.25, (64, 1, 256)),
        ((768, 12, 3072), 1 / 3, (256, 4, 1024)),
        ((100, 5, 300), 0.5, (50, 2, 150)),
        ((96, 9, 300), 1 / 3, (32, 2, 100)),  # 3 heads do not divide 32
        ((8, 8, 8), 0.01, (1, 1, 1)),
    ],
)
def test_sizes_of_the_generator(sizes: tuple[int, int, int], ratio: float, expected: tuple[int, int, int]) -> None:
    assert tuple(generator_sizes(*sizes, ratio).values()) == expected


def test_the_generator_differs_in_its_sizes_alone() -> None:
    config = ElectraConfig(vocab_size=101, embedding_size=16, **SIZES, layer_norm_eps=1e-3, pad_token_id=7)
    ours, theirs = config.to_dict(), generator_config(config, 0.5).to_dict()
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert changed == {"hidden_size", "intermediate_size", "num_attention_heads"}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_follow_the_softmax(temperature: float) -> None:
    """Chi-square over 60,000 draws from one distribution of 300 tokens."""
    count, vocab = 60_000, 300
    hidden = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(vocab, 8, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(2))
    drawn = sampled_tokens(hidden.expand(count, -1), weight, bias, keys(count), temperature=temperature)
    expected = count * ((hidden @ weight.T + bias) / temperature).softmax(-1)[0]
    found = torch.bincount(drawn, minlength=vocab).float()
    often = expected > 5
    statistic = float(((found - expected) ** 2 / expected)[often].sum())
    degrees = int(often.sum()) - 1
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5
    assert float(found[~often].sum()) == pytest.approx(float(expected[~often].sum()), abs=60)


def test_samples_of_neighbours_are_independent() -> None:
    """Of two uniform distributions, even with keys that differ by one, one sample tells nothing of the next."""
    near = torch.stack([torch.arange(20_000), torch.full((20_000,), 3)], dim=1)
    for found in (near, near.flip(1), keys(20_000)):
        drawn = sampled_tokens(torch.zeros(20_000, 1), torch.zeros(64, 1), None, found, temperature=1.0)
        table = torch.bincount(drawn[:-1] % 8 * 8 + drawn[1:] % 8, minlength=64).float()
        statistic = float(((table - table.mean()) ** 2 / table.mean()).sum())
        assert statistic < 63 + 5 * 126**0.5


def test_a_low_temperature_takes_the_likeliest() -> None:
    hidden, weight = torch.randn(50, 8), torch.randn(40, 8)
    drawn = sampled_tokens(hidden, weight, None, keys(50), temperature=1e-6)
    assert drawn.equal((hidden @ weight.T).argmax(-1))


def test_samples_have_no_gradient_and_any_chunks() -> None:
    hidden = torch.randn(600, 8, requires_grad=True)
    weight = torch.randn(40_000, 8)
    whole = sampled_tokens(hidden, weight, None, keys(600), temperature=1.0)  # three chunks
    assert not whole.requires_grad and whole.shape == (600,)
    one_by_one = [
        sampled_tokens(hidden[i : i + 1], weight, None, keys(600)[i : i + 1], temperature=1.0) for i in (0, 299, 599)
    ]
    assert torch.cat(one_by_one).equal(whole[[0, 299, 599]])


def test_rounding_moves_few_samples() -> None:
    """Where all probabilities are small, too: hidden states in bfloat16 change one sample of a hundred."""
    hidden, weight = torch.randn(2000, 32), 0.02 * torch.randn(8000, 32)
    first = sampled_tokens(hidden, weight, None, keys(2000), temperature=1.0)
    again = sampled_tokens(hidden.bfloat16().float(), weight, None, keys(2000), temperature=1.0)
    assert float((first != again).float().mean()) < 0.01
