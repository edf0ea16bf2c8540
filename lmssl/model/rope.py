"""Another base of rotary positions for a model that exists: longer sequences want longer wavelengths."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def rope_theta(model: PreTrainedModel) -> float:
    """The base of a model's rotary positions; of ModernBERT, that of the layers that see whole documents."""
    return float(_parameters(model)["rope_theta"])


def set_rope_theta(model: PreTrainedModel, theta: float) -> None:
    """Change the base in place, in the config and in the frequencies, to what a model built with it has.

    ModernBERT's local layers keep theirs. Weights, names and places of tensors stay, so optimisers and compiled code
    hold on.
    Source: the long phase of ModernBERT (Warner et al. 2024), 10,000 to 160,000 in global layers at 8,192 tokens; the
    base frequency of Xiong et al. 2023.
    """
    _parameters(model)["rope_theta"] = theta
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                fresh: Any = type(module)(model.config)
                for name, frequencies in fresh.named_buffers():
                    module.get_buffer(name).copy_(frequencies)


def _parameters(model: PreTrainedModel) -> dict[str, Any]:
    parameters = model.config.rope_parameters
    found: dict[str, Any] = parameters.get("full_attention", parameters)
    return found
