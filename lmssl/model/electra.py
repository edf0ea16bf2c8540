"""ELECTRA's two models as one: a discriminator and the smaller generator that fills masks for it.

Shapes: N targets, D width, V vocabulary, in R blocks of S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining, PreTrainedModel

from lmssl.model.head import chunk_size
from lmssl.recipe.encoders import generator_sizes

_LOW_BITS = 2**31 - 1
"""Keys and hashes have 31 bits, so that products of two fit into int64, and no compiler sees an overflow."""
_BLOCK = 128
"""Tokens of a block; as many as there are blocks, more or less, need least noise."""


class ElectraPair(PreTrainedModel):
    """Both stock models, with one module for their embeddings.

    A `PreTrainedModel` so that it can stand wherever a stock model does; it is never saved as one.
    Source: ELECTRA (Clark et al. 2020), whose paper ties the embeddings of tokens and positions; the released code
    also ties those of sentences and the norm after them, as here.
    """

    config_class = ElectraConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    discriminator: ElectraForPreTraining
    generator: ElectraForMaskedLM

    def __init__(self, config: ElectraConfig, generator_ratio: float) -> None:
        """Draw the weights of both.

        Args:
            config: the discriminator's.
            generator_ratio: width of the generator's layers / the discriminator's.
        """
        super().__init__(config)
        self.discriminator = ElectraForPreTraining(config)
        self.generator = ElectraForMaskedLM(generator_config(config, generator_ratio))
        self.generator.electra.embeddings = self.discriminator.electra.embeddings
        if config.tie_word_embeddings:
            self.generator.generator_lm_head.weight = self.discriminator.electra.embeddings.word_embeddings.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The discriminator's forward."""
        return self.discriminator(*args, **kwargs)


def generator_config(config: ElectraConfig, ratio: float) -> ElectraConfig:
    """The generator's config: narrower layers between the same embeddings."""
    fields = config.to_dict()
    sizes = generator_sizes(config.hidden_size, config.num_attention_heads, config.intermediate_size, ratio)
    return ElectraConfig(**{**fields, **sizes})


@torch.no_grad()  # a sample has no gradient
def sampled_tokens(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, keys_N2: Tensor, *, temperature: float
) -> Tensor:
    """A token drawn from the softmax of each target's logits, int64 [N], fixed by the target's keys.

    Rounding of the logits by some e, as by other shapes or kernels, changes a share of the samples of the order of e.

    Args:
        keys_N2: random integers in [0, 2^31).
        temperature: the logits are divided by it.
    Source: the Gumbel trick of ELECTRA's released code; differs in noise that is a hash of the keys, which needs no
    random state, and in two draws, one of a block of tokens and one inside it, which need little noise. One number and
    the inverse of the distribution function would need less, but where probabilities are small, rounding moves the
    bounds of thousands of tokens, and many samples with them.
    """
    weight_VD, vocab_size = weight_VD.to(hidden_ND.dtype), weight_VD.shape[0]
    num_blocks = -(-vocab_size // _BLOCK)
    size = chunk_size(hidden_ND.shape[0], vocab_size)
    found = []
    for start in range(0, hidden_ND.shape[0], size):
        part = slice(start, start + size)
        logits_NV = (hidden_ND[part] @ weight_VD.t()).float()
        logits_NV = (logits_NV if bias_V is None else logits_NV + bias_V.float()) / temperature
        logits_NV = F.pad(logits_NV, (0, num_blocks * _BLOCK - vocab_size), value=-torch.inf)
        logits_NRS = logits_NV.unflatten(1, (num_blocks, _BLOCK))
        noise = _gumbel(keys_N2[part], num_blocks + _BLOCK)
        block_N = (logits_NRS.logsumexp(-1) + noise[:, :num_blocks]).argmax(-1)
        inside_NS = logits_NRS.gather(1, block_N[:, None, None].expand(-1, 1, _BLOCK))[:, 0]
        found.append(block_N * _BLOCK + (inside_NS + noise[:, num_blocks:]).argmax(-1))
    return torch.cat(found)


def _gumbel(keys_N2: Tensor, count: int) -> Tensor:
    """So many numbers of the standard Gumbel distribution for each target, float32 [N, count]."""
    numbers = torch.arange(count, device=keys_N2.device)
    # Odd factors and shifts permute the numbers of 31 bits: those of a target differ from each other.
    hashes = (numbers * 0x1B56C4E9 + keys_N2[:, :1]) & _LOW_BITS
    for factor, key in ((0x2C1B3C6D, keys_N2[:, 1:]), (0x297A2D39, 0), (0x5A5A5A5B, 0)):
        hashes = ((hashes ^ (hashes >> 15)) * factor + key) & _LOW_BITS
    hashes = hashes ^ (hashes >> 16)
    # Exponential numbers near 0 decide, and there float32 is finest; 1 would be minus infinity.
    uniform = ((hashes.float() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def detections(model: ElectraPair, hidden_BTD: Tensor) -> Tensor:
    """The discriminator's logits, float32 [B, T]; above 0: replaced."""
    head = model.discriminator.discriminator_predictions
    logits_BT: Tensor = head(hidden_BTD)
    return logits_BT.float()
