"""The section `card`: what a model card says that no number tells."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lmssl.recipe.base import AsTuple, Section


class CardSection(Section):
    """What people decide about a model, for its card."""

    license: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9.+-]*$")
    """Of the weights, in the Hub's words, such as apache-2.0 or cc-by-4.0; a public push needs one."""
    languages: Annotated[tuple[str, ...], AsTuple] = ()
    """Of the text, as ISO 639 codes, such as en."""
