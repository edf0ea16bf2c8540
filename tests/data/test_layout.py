from dataclasses import replace
from typing import Any

import pytest

from lmssl.data.layout import Layout
from lmssl.errors import DataError
from lmssl.recipe.data import DataSection
from lmssl.tokenizer.load import Tokenizer


def section(jsonl: Any, **tokens: bool) -> DataSection:
    return DataSection(sequence_length=64, mixture=(jsonl(),), **{"eos": False, **tokens})


@pytest.mark.parametrize(
    ("tokens", "seps", "overhead"),
    [
        ({}, 1, 0),
        ({}, 2, 0),
        ({"bos": True, "eos": True}, 2, 0),
        ({"cls": True}, 2, 1),
        ({"sep": True}, 1, 1),
        ({"cls": True, "sep": True}, 1, 2),
        ({"cls": True, "sep": True}, 2, 3),
    ],
)
def test_the_overhead_of_a_segment(
    jsonl: Any, tokenizer: Tokenizer, tokens: dict[str, bool], seps: int, overhead: int
) -> None:
    layout = Layout.of(section(jsonl, **tokens), tokenizer, 1, seps_per_segment=seps)
    assert layout.overhead_tokens == overhead
    for role in ("bos", "eos", "cls", "sep"):
        expected = getattr(tokenizer, f"{role}_id") if role in tokens else None
        assert getattr(layout, f"{role}_id") == expected


@pytest.mark.parametrize("role", ["bos", "eos", "cls", "sep"])
def test_a_special_token_the_tokenizer_lacks(jsonl: Any, tokenizer: Tokenizer, role: str) -> None:
    lacking = replace(tokenizer, **{f"{role}_id": None})
    with pytest.raises(DataError, match=f"data.{role} is on, and the tokenizer has no {role} token") as caught:
        Layout.of(section(jsonl, **{role: True}), lacking, 1)
    assert f"set data.{role}: false" in str(caught.value.remedy)
    Layout.of(section(jsonl), lacking, 1)
