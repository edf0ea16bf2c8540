"""A compiled run compiles in its first steps, and never again: not after evaluation, not after a save."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters, get_compilation_metrics

from lmssl import checkpoint
from lmssl.recipe.load import load_recipe
from lmssl.train import loop
from lmssl.train.launch import can_compile
from lmssl.train.run import train
from runs import metrics, small_recipe, write_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what the compiler imports
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # as it traces
    pytest.mark.skipif(not can_compile(), reason="there is no C++ compiler"),
]

STEPS = 10
SETTLED_STEPS = 3
"""Steps after which nothing may be compiled."""
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
KINDS: dict[str, dict[str, Any]] = {
    "causal": {"model": {"kind": "llama", **SIZES}},
    "masked": {
        "model": {"kind": "bert", **SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "objective": {"kind": "masked", "rate": 0.3, "final_rate": 0.15},
        "tokenizer": {"path": "tokenizer/wordpiece-8k"},
    },
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)


def compilations() -> int:
    """Graphs the compiler was asked for so far, recompilations and failed attempts among them."""
    return len(get_compilation_metrics()) + counters["stats"]["unique_graphs"]


def test_a_new_shape_is_seen() -> None:
    plus_one = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    counts = [compilations()]
    for length in (2, 2, 3):
        plus_one(torch.zeros(length))
        counts.append(compilations())
    assert counts[0] < counts[1] == counts[2] < counts[3]


@pytest.mark.parametrize(("kind", "scope"), [("causal", "model"), ("masked", "model"), ("causal", "layers")])
def test_nothing_is_compiled_after_the_third_step(
    kind: str, scope: str, tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(
        text_folder,
        tmp_path / "run",
        tmp_path / "cache",
        steps=STEPS,
        **{
            "train.compile": scope,
            "train.precision": "bf16",
            "train.batch_tokens": 512,
            "train.tokens": 512 * STEPS,
            "train.micro_batch_sequences": 4,  # two micro-batches a step
            "evaluate.every_steps": 4,
            "checkpoint.every_steps": 6,
            **KINDS[kind],
        },
    )
    before, after_steps = compilations(), []
    plain = loop.train_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        measured = plain(*args, **kwargs)
        after_steps.append(compilations() - before)
        return measured

    monkeypatch.setattr(loop, "train_step", counted)
    train(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)))
    assert len(after_steps) == STEPS
    assert after_steps[0] > 0, "nothing was compiled at all"
    assert [count - after_steps[SETTLED_STEPS - 1] for count in after_steps[SETTLED_STEPS:]] == [0] * (STEPS - 3)
    assert compilations() - before == after_steps[-1], "the last evaluation or save compiled something"
    done = [row["step"] for row in metrics(tmp_path / "run") if row["kind"] == "evaluate"]
    assert done == [0, 4, 8, STEPS]
    assert checkpoint.find_step(tmp_path / "run", None).step == STEPS
