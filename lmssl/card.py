"""The model card of an export: what was trained, on what, with which numbers."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from lmssl import __version__
from lmssl.checkpoint import Checkpoint
from lmssl.recipe.load import load_recipe
from lmssl.recipe.sections import Recipe


def write_card(folder: Path, *, run: Path, found: Checkpoint, num_parameters: int) -> None:
    """Write README.md with front matter into an export folder.

    Args:
        run: the run folder, for metrics and sessions.
        found: the checkpoint that was exported.
    """
    recipe = load_recipe(found.path / "recipe.yaml").recipe
    state = json.loads(found.text("state.json"))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lmssl", "pretraining", recipe.objective.kind],
        model_name=recipe.name,
    )
    body = _body(recipe, found, state, _sessions(run), num_parameters)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / "README.md")


def _sessions(run: Path) -> list[dict[str, object]]:
    path = run / "sessions.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _body(
    recipe: Recipe, found: Checkpoint, state: dict[str, object], sessions: list[dict[str, object]], num_parameters: int
) -> str:
    corpora = "\n".join(
        f"| {corpus.name} | {corpus.kind} | {'by size' if corpus.weight is None else f'{corpus.weight:g}'} |"
        for corpus in recipe.data.mixture
    )
    evaluation = state.get("evaluation")
    numbers = "No held-out text was evaluated."
    if isinstance(evaluation, dict) and evaluation:
        numbers = (
            f"On held-out documents of the same corpora, at step {evaluation['step']}: "
            f"loss {evaluation['loss']:.4f} nats per token, {evaluation['bits_per_byte']:.4f} bits per byte."
        )
    last = sessions[-1] if sessions else {}
    versions = last.get("versions")
    with_versions = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "unknown"
    recipe_text = found.text("recipe.yaml").strip()
    return f"""# {recipe.name}

A `{recipe.model.kind}` language model with {num_parameters:,} parameters, pretrained from random weights with
[lmssl](https://pypi.org/project/lmssl/) {__version__} by next-token prediction.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO")
model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPO")
```

## Data
| corpus | kind | weight |
| --- | --- | --- |
{corpora}

Trained on {state["tokens_seen"]:,} tokens in {found.step:,} steps, sequences of {recipe.data.sequence_length} tokens,
packing `{recipe.data.packing}`, document attention {"on" if recipe.data.document_attention else "off"}.

## Evaluation
{numbers}

## Limits
A base model: it continues text and follows no instructions. It repeats what its text says, errors and prejudice
included.

## How it was made
Device: {last.get("device", "unknown")}; {with_versions}.
Steps skipped for non-finite numbers: {state["skipped_steps"]}.

{_fenced(recipe_text)}
"""


def _fenced(text: str) -> str:
    """A YAML block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text}\n{fence}"
