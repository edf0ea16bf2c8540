"""Field docstrings are found for every section, inherited ones included."""

from __future__ import annotations

from lmssl.recipe.meaning import fill_descriptions, meanings, section_classes
from lmssl.recipe.model import LlamaModel
from lmssl.recipe.optim import AdamW
from lmssl.recipe.train import TrainSection


def test_a_docstring_belongs_to_the_field_above_it() -> None:
    found = meanings(AdamW)
    assert found["lr"] == "Peak learning rate."
    assert "kind" not in found


def test_inherited_fields_are_found() -> None:
    assert meanings(LlamaModel)["vocab_size"].startswith("Rows of the embedding")


def test_every_section_is_found_by_name() -> None:
    assert section_classes()["TrainSection"] is TrainSection


def test_descriptions_are_there_once_filled() -> None:
    fill_descriptions()
    assert AdamW.model_fields["lr"].description == "Peak learning rate."
