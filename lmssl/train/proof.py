"""Prove that a compiled step, or one by kernels of our own, computes what the plain one does, before its first update.

A compiler that is wrong is seldom wrong loudly: gcc 12 at -O3 miscompiles some of the loops that torch 2.13 writes for
CPUs with AVX-512, and their garbage can be finite. One plain forward and backward costs little beside compiling, and a
step or two beside a run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lmssl.model import native
from lmssl.objective.module import LossModule

GRADIENT_TOLERANCE = 0.05
"""Norm of the difference of a weight's gradients / their norm; in bfloat16 both sides round and differ by 1 %."""
NOISE_RATIO = 2e-3
"""A difference below this share of the whole gradient's norm is rounding: some gradients, as of keys' biases, are 0."""


def step_difference(module: LossModule, inputs: Mapping[str, Tensor], weights: Mapping[str, float]) -> str | None:
    """What a module computes otherwise than torch does uncompiled on a micro-batch, in words, or None.

    Args:
        module: compiled in place, or in use of kernels; gradients that its weights hold are left alone.
        weights: the objective's terms.
    """
    with torch.compiler.set_stance("force_eager"), native.without():
        plain_loss, plain = _gradients(module, inputs, weights)
    loss, found = _gradients(module, inputs, weights)
    if not abs(loss - plain_loss) <= GRADIENT_TOLERANCE * abs(plain_loss):
        return f"a loss of {loss:.4g} instead of {plain_loss:.4g}"
    whole = torch.stack([gradient.norm() for gradient in plain.values()]).norm()
    for name, gradient in plain.items():
        difference = (found[name] - gradient).norm()  # NaN is not below the limit, hence "not" and "<="
        if not difference <= GRADIENT_TOLERANCE * gradient.norm() + NOISE_RATIO * whole:
            ratio = float(difference / gradient.norm().clamp(min=1e-30))
            return f"a gradient of {name} that differs by {ratio:.1%}"
    return None


def has_dropout(model: nn.Module) -> bool:
    """Whether a stock model draws random numbers in training; compiled it draws others."""
    values = model.config.to_dict().items()  # type: ignore[operator,union-attr]
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in values)


def _gradients(
    module: LossModule, inputs: Mapping[str, Tensor], weights: Mapping[str, float]
) -> tuple[float, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=()):  # dropout is the same on both sides, and training draws what it would have
        torch.manual_seed(0)
        sums = module(dict(inputs))
    loss = torch.stack([weight * sums[term] for term, weight in weights.items()]).sum()
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)  # past the hooks that DDP has
    found = {name: g.float() for name, g in zip(named, gradients, strict=True) if g is not None}
    return float(loss.detach()), found
