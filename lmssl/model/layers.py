"""The stacks of layers of a stock model, hidden states at places, and forgetting what is inside a layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def layer_stacks(module: nn.Module) -> list[nn.ModuleList]:
    """The longest list of layers, and others as long: T5 has two, and so has ELECTRA with its generator."""
    named = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList)}
    outer = [part for name, part in named.items() if not any(name.startswith(f"{above}.") for above in named)]
    longest = max(map(len, outer))
    return [stack for stack in outer if len(stack) == longest]


def at_places(hidden_BTD: Tensor, places_BC: Tensor) -> Tensor:
    """Hidden states [B, C, D] at C places of each sequence of T tokens."""
    return hidden_BTD.gather(1, places_BC[:, :, None].expand(-1, -1, hidden_BTD.shape[-1]))


def recompute_layers(module: nn.Module, every: int) -> int:
    """Let every so-manieth layer keep its input alone and compute the rest again in the backward pass.

    Gradients stay the same, bit for bit where nothing is compiled, dropout included; in evaluation nothing changes.
    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"; every k-th layer as in torchtitan.
    Differs from transformers' `gradient_checkpointing_enable` in wrapping the layer's forward in place, for every
    family and version alike; parameter names and what a compiler or a sharding wrapper hangs on the layer stay.

    Args:
        every: 1 is each layer; 2 each other one, from the first on.
    Returns:
        how many layers forget.
    """
    count = 0
    for stack in layer_stacks(module):
        for layer in list(stack)[::every]:
            layer.forward = _recomputed(layer, layer.forward)
            count += 1
    return count


def _recomputed(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
