"""Parameter groups by role, and the optimiser over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import distributed, nn

from lmssl.optim.muon import MuonWithAdamW
from lmssl.optim.parts import matrix_parts
from lmssl.recipe.optim import AdamW, Muon, Role, role_rates

_FEW_OUTPUTS = 2
"""A matrix that makes so few numbers answers a question, as ELECTRA's and the second task of BERT do."""


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every trainable parameter, by name, in the model's order.

    Vectors are norms and biases, by their number of dimensions (GPT-2's and nanoGPT's rule). Embeddings are the weights
    of `nn.Embedding`, whether tied to a head or not; learned positions and position biases are among them. The head is
    the stock model's output matrix where it is one of its own, and what makes one or two numbers. All else is a matrix.
    """
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    heads = {id(weight) for weight in _output_weights(model)}
    found: dict[str, Role] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            found[name] = "vector"
        elif id(parameter) in embeddings:
            found[name] = "embedding"
        elif id(parameter) in heads or min(parameter.shape) <= _FEW_OUTPUTS:
            found[name] = "head"
        else:
            found[name] = "matrix"
    return found


def _output_weights(model: nn.Module) -> Iterable[nn.Parameter]:
    """Output matrices of all stock models inside: ELECTRA's pair is two."""
    for part in model.modules():
        find: Any = getattr(part, "get_output_embeddings", None)
        head = None if find is None else find()
        if head is not None:
            yield head.weight


def parameter_groups(model: nn.Module, section: AdamW | Muon) -> list[dict[str, Any]]:
    """Groups of one role each as the optimiser takes them: everything but vectors in the model's order, then vectors.

    A role has several groups where others stand between its parameters: the gradient norm is summed in the order of
    the groups, and runs of earlier versions must continue bit for bit.
    """
    named, rates = dict(model.named_parameters()), role_rates(section)
    roles = sorted(parameter_roles(model).items(), key=lambda item: item[1] == "vector")
    groups = []
    for role, run in groupby(roles, key=lambda item: item[1]):
        names = [name for name, _ in run]
        rate = rates[role]
        group: dict[str, Any] = {"params": [named[name] for name in names], "names": names, "role": role}
        group |= {"optimizer": rate.optimizer, "lr": rate.peak_lr, "peak_lr": rate.peak_lr}
        groups.append(group | {"weight_decay": rate.weight_decay})
    return groups


def build_optimizer(
    model: nn.Module,
    section: AdamW | Muon,
    *,
    ranks: distributed.ProcessGroup | None = None,
    bf16: bool = True,
) -> torch.optim.Optimizer:
    """The optimiser over `parameter_groups`; states are float32 because the weights are.

    Each group has `names`, `role` and `peak_lr`; before every step the caller sets its `lr`, and where it has one its
    `momentum`, as `set_rates` does. `found_inf` gates the step on the device as in torch's fused AdamW.

    Args:
        model: with the names and shapes of the stock model; after sharding, where weights are sharded by FSDP2.
        ranks: processes with copies of the same weights and gradients, among which Muon divides its work and its
            momentum; None: this process does it all, or weights are sharded and tell the division.
        bf16: whether Muon computes in bfloat16 as the model does, or in float32.
    Raises:
        ValueError: a weight is not float32 (updates smaller than half a bf16 ulp would be lost).
        ModelError: a weight that Muon should update is no matrix, or several that are joined in an unknown way.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}; master weights must be float32")
    groups = parameter_groups(model, section)
    if isinstance(section, AdamW):
        return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)
    parts = matrix_parts(model, [name for group in groups if group["optimizer"] == "muon" for name in group["names"]])
    return MuonWithAdamW(
        groups, parts, momentum=section.momentum, betas=section.betas, eps=section.eps, ranks=ranks, bf16=bf16
    )


def set_rates(groups: Sequence[dict[str, Any]], *, ratio: float, momentum: float | None) -> None:
    """Give every group its rate for the next step.

    Args:
        ratio: of the peak rate, from `schedule.lr_ratio`.
        momentum: of the groups that have one, from `schedule.momentum_at`.
    """
    for group in groups:
        group["lr"] = group["peak_lr"] * ratio
        if "momentum" in group and momentum is not None:
            group["momentum"] = momentum
