"""A small valid recipe, its file, and the error that a changed one gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lmssl.errors import RecipeError
from lmssl.recipe.load import Loaded, load_recipe

TEXT = """\
name: tiny
tokenizer: {path: tokenizer/bpe-4k}
data:
  sequence_length: 64
  mixture:
    - {name: a, kind: text, path: "a/*.txt", weight: 0.7}
    - {name: b, kind: jsonl, path: b.jsonl, field: body, weight: 0.3}
objective: {kind: causal}
model: {kind: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4}
optim: {kind: adamw, lr: 3e-3}
schedule: {kind: wsd, warmup_tokens: 1_000, decay_ratio: 0.1}
train: {tokens: 1e5, batch_tokens: 1024, micro_batch_sequences: 4}
"""

Load = Callable[..., Loaded]
Refusal = Callable[..., RecipeError]


@pytest.fixture
def text() -> str:
    """A valid recipe of twelve lines."""
    return TEXT


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads the recipe with overrides; `replace` pairs change its text first."""

    def run(*overrides: str, replace: Sequence[tuple[str, str]] = (), raw: str | bytes | None = None) -> Loaded:
        content = TEXT if raw is None else raw
        for old, new in replace:
            assert isinstance(content, str) and old in content
            content = content.replace(old, new)
        path = tmp_path / "tiny.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_recipe(path, overrides)

    return run


@pytest.fixture
def refusal(load: Load) -> Refusal:
    """The error that loading gives."""

    def run(*overrides: str, replace: Sequence[tuple[str, str]] = (), raw: str | bytes | None = None) -> RecipeError:
        with pytest.raises(RecipeError) as caught:
            load(*overrides, replace=replace, raw=raw)
        assert caught.value.exit_code == 2
        return caught.value

    return run
