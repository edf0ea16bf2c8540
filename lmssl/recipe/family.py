"""What the classes of all families of models share; the families are in `encoders` and `model`."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from lmssl.recipe.base import Float, Int, Section


class ModelBase(Section):
    """Fields every family shares; null: derived from tokenizer and data."""

    model_config = ConfigDict(protected_namespaces=())

    vocab_size: Int | None = Field(default=None, ge=1)
    """Rows of the embedding; null: the tokenizer's size rounded up to `tokenizer.pad_to_multiple`."""
    tie_word_embeddings: bool = True
    """One matrix for embedding and head."""


class DrawnModel(ModelBase):
    """Families whose initial weights have one standard deviation."""

    initializer_range: Float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights."""
