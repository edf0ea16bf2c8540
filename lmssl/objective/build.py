"""From the recipe's `objective` section to an objective."""

from __future__ import annotations

from lmssl.objective.base import Objective
from lmssl.objective.causal import CausalObjective
from lmssl.recipe.sections import Recipe


def build_objective(recipe: Recipe) -> Objective:
    """The objective of a recipe."""
    return CausalObjective(document_attention=recipe.data.document_attention)
