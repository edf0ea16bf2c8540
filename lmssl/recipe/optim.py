"""The section `optim`, and what it means for each role that a parameter can have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from lmssl.recipe.base import AsTuple, Float, Int, Section

Role = Literal["matrix", "embedding", "head", "vector"]
"""What a parameter does: a hidden matrix, rows looked up, the output matrix, or a norm or bias."""

ROLES: tuple[Role, ...] = ("matrix", "embedding", "head", "vector")


class RoleRates(NamedTuple):
    """How the parameters of one role are updated."""

    optimizer: Literal["adamw", "muon"]
    peak_lr: float
    weight_decay: float


class _Optim(Section):
    """What all optimisers have."""

    kind: str
    lr: Float = Field(gt=0)
    """Peak learning rate."""
    embedding_lr: Float | None = Field(default=None, gt=0)
    """Peak learning rate of embeddings; null: that of all that AdamW updates."""
    head_lr: Float | None = Field(default=None, gt=0)
    """Peak learning rate of an output matrix of its own; null: that of all that AdamW updates."""
    weight_decay: Float = Field(default=0.1, ge=0)
    """Applied to matrices, embeddings and head, not to norms and biases."""
    betas: Annotated[tuple[Float, Float], AsTuple] = (0.9, 0.95)
    """AdamW's; GPT-3's values."""
    eps: Float = Field(default=1e-8, gt=0)
    """AdamW's."""
    max_grad_norm: Float | None = Field(default=1.0, gt=0)
    """Global gradient norm is clipped to this; null: off."""


class AdamW(_Optim):
    """AdamW (Loshchilov & Hutter 2019), decay multiplied by the learning rate as in torch; fused."""

    kind: Literal["adamw"]


class MomentumWarmup(Section):
    """Less momentum first: it grows in a straight line with the tokens read."""

    from_momentum: Float = Field(default=0.85, ge=0, lt=1)
    """Momentum of the first step."""
    tokens: Int = Field(ge=1)
    """Tokens of the run over which it grows to `optim.momentum`."""


class Muon(_Optim):
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW for everything else.

    Updates have the size of AdamW's (Liu et al. 2025, Moonlight), so learning rates that suit AdamW suit here.
    """

    kind: Literal["muon"]
    lr: Float = Field(gt=0)
    """Peak learning rate of hidden matrices."""
    adamw_lr: Float | None = Field(default=None, gt=0)
    """Peak learning rate of embeddings, head, norms and biases; null: `lr`."""
    momentum: Float = Field(default=0.95, ge=0, lt=1)
    """Nesterov's, of the gradients of hidden matrices."""
    momentum_warmup: MomentumWarmup | None = None
    """Less of it at the beginning; null: none."""


AnyOptim = Annotated[AdamW | Muon, Field(discriminator="kind")]


def role_rates(section: AdamW | Muon) -> dict[Role, RoleRates]:
    """How each role is updated; what `show` prints and what the optimiser is built from.

    >>> muon = Muon(kind="muon", lr=0.01, adamw_lr=0.003, embedding_lr=0.02)
    >>> role_rates(muon)["matrix"], role_rates(muon)["embedding"].peak_lr, role_rates(muon)["head"].peak_lr
    (RoleRates(optimizer='muon', peak_lr=0.01, weight_decay=0.1), 0.02, 0.003)
    """
    plain = section.lr if isinstance(section, AdamW) else section.adamw_lr or section.lr
    decay = section.weight_decay
    return {
        "matrix": RoleRates(section.kind, section.lr, decay),
        "embedding": RoleRates("adamw", section.embedding_lr or plain, decay),
        "head": RoleRates("adamw", section.head_lr or plain, decay),
        "vector": RoleRates("adamw", plain, 0.0),
    }


def optim_problems(section: AdamW | Muon, *, has_head: bool) -> Iterator[str]:
    """Sentences `path: what; remedy` for values that cannot hold together.

    Args:
        has_head: whether the model has an output matrix that is not its embedding.
    """
    if section.head_lr is not None and not has_head:
        yield (
            "optim.head_lr: the head is the embedding (model.tie_word_embeddings), which has optim.embedding_lr; "
            "leave it out"
        )
    warmup = section.momentum_warmup if isinstance(section, Muon) else None
    if warmup is not None and isinstance(section, Muon) and warmup.from_momentum > section.momentum:
        yield (
            f"optim.momentum_warmup.from_momentum: {warmup.from_momentum} is more than "
            f"optim.momentum={section.momentum}; lower it"
        )
