"""Parameter groups by role, and the optimiser over them."""

from __future__ import annotations

import torch
from torch import nn

from lmssl.recipe.sections import AdamW


def parameter_groups(model: nn.Module) -> dict[str, list[str]]:
    """Names of trainable parameters by role: `decay` (matrices, embeddings included) and `no_decay` (norms, biases).

    Source: GPT-2's and nanoGPT's rule by number of dimensions.
    """
    groups: dict[str, list[str]] = {"decay": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["decay" if parameter.ndim >= 2 else "no_decay"].append(name)
    return groups


def build_optimizer(model: nn.Module, section: AdamW) -> torch.optim.Optimizer:
    """Fused AdamW over `parameter_groups`; states are float32 because the weights are.

    Raises:
        ValueError: a weight is not float32 (updates smaller than half a bf16 ulp would be lost).
    """
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}; master weights must be float32")
    decay = {"decay": section.weight_decay, "no_decay": 0.0}
    groups = [
        {"params": [named[name] for name in names], "weight_decay": decay[role]}
        for role, names in parameter_groups(model).items()
        if names
    ]
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)
