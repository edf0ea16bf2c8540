"""The model card of an export: what was trained, on what, with which numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lmssl import __version__
from lmssl.checkpoint import Checkpoint
from lmssl.data.order import skipped_before
from lmssl.recipe.load import load_recipe
from lmssl.recipe.sections import Recipe

AUTO_CLASSES = {
    **dict.fromkeys(("causal", "prefix", "hybrid"), "AutoModelForCausalLM"),
    "masked": "AutoModelForMaskedLM",
    "span": "AutoModelForSeq2SeqLM",
    "replaced": "AutoModelForPreTraining",
}
"""The class that loads an export, by kind of objective."""

PREDICTIONS = {
    "causal": "next-token prediction",
    "prefix": "prefix language modelling",
    "hybrid": "next-token and masked-next-token prediction",
    "masked": "masked-token prediction",
    "span": "span corruption",
    "replaced": "replaced-token detection",
}
PIPELINES = {
    **dict.fromkeys(("causal", "prefix", "hybrid"), "text-generation"),
    "masked": "fill-mask",
    "span": "text2text-generation",
    "replaced": "feature-extraction",
}
USES = {
    **dict.fromkeys(("causal", "prefix", "hybrid"), "continues text"),
    "masked": "fills masks",
    "span": "fills gaps",
    "replaced": "finds replaced tokens",
}

GENERATOR = """
The folder `generator` holds the smaller model that filled masks for it in training:
`AutoModelForMaskedLM.from_pretrained("PATH_OR_REPO", subfolder="generator")`.
"""


def write_card(folder: Path, *, run: Path, found: Checkpoint, num_parameters: int, ema: bool = False) -> None:
    """Write README.md with front matter into an export folder.

    Args:
        run: the run folder, for metrics and sessions.
        found: the checkpoint that was exported.
        ema: what was exported is the moving average of its weights.
    """
    recipe = load_recipe(found.path / "recipe.yaml").recipe
    state = json.loads(found.text("state.json"))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINES[recipe.objective.kind],
        tags=["lmssl", "pretraining", recipe.objective.kind],
        model_name=recipe.name,
    )
    body = _body(recipe, found, state, _sessions(run), num_parameters, averaged=_averaged(recipe) if ema else "")
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / "README.md")


def _averaged(recipe: Recipe) -> str:
    return (
        f"The weights here are a moving average over training steps (decay {recipe.train.ema_decay:g}); the numbers "
        "below are those of the weights themselves.\n\n"
    )


def _sessions(run: Path) -> list[dict[str, object]]:
    path = run / "sessions.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _body(
    recipe: Recipe,
    found: Checkpoint,
    state: dict[str, Any],
    sessions: list[dict[str, object]],
    num_parameters: int,
    averaged: str,
) -> str:
    last = sessions[-1] if sessions else {}
    versions = last.get("versions")
    with_versions = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "unknown"
    document_attention = "on" if recipe.data.document_attention else "off"
    recipe_text = found.text("recipe.yaml").strip()
    auto_class = AUTO_CLASSES[recipe.objective.kind]
    return f"""# {recipe.name}

A `{recipe.model.kind}` language model with {num_parameters:,} parameters, pretrained from random weights with
[lmssl](https://pypi.org/project/lmssl/) {__version__} by {PREDICTIONS[recipe.objective.kind]}.

```python
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO")
model = {auto_class}.from_pretrained("PATH_OR_REPO")
```
{GENERATOR if recipe.objective.kind == "replaced" else ""}
## Data
{_corpora(recipe, state)}

Trained on {state["tokens_seen"]:,} tokens in {found.step:,} steps, sequences of {recipe.data.sequence_length} tokens,
packing `{recipe.data.packing}`, document attention {document_attention}.{_changes(recipe, state)}

## Evaluation
{averaged}{_evaluation(state)}

## Limits
A base model: it {USES[recipe.objective.kind]} and follows no instructions. It repeats what its text says, errors and
prejudice included.

## How it was made
Device: {last.get("device", "unknown")}; {with_versions}.
Steps skipped for non-finite numbers: {state["skipped_steps"]}.

{_fenced(recipe_text)}
"""


def _corpora(recipe: Recipe, state: dict[str, Any]) -> str:
    """A table of corpora, with epochs where the checkpoint knows them."""
    epochs = state.get("epochs") or {}
    rows = ["| corpus | kind | weight | epochs |", "| --- | --- | --- | --- |"]
    for corpus in recipe.data.mixture:
        weight = "by size" if corpus.weight is None else f"{corpus.weight:g}"
        read = f"{epochs[corpus.name]:.2f}" if corpus.name in epochs else "unknown"
        rows.append(f"| {corpus.name} | {corpus.kind} | {weight} | {read} |")
    return "\n".join(rows)


def _changes(recipe: Recipe, state: dict[str, Any]) -> str:
    """Sentences on temperature, limits of epochs, stages that have begun and positions left out; mostly none."""
    lines = []
    if recipe.data.temperature is not None:
        lines.append(f"Weights were evened out by a temperature of {recipe.data.temperature:g}.")
    limits = [f"{c.name} {c.max_epochs:g}" for c in recipe.data.mixture if c.max_epochs is not None]
    if limits:
        lines.append(f"Shares were lowered to keep to at most so many epochs: {', '.join(limits)}.")
    for stage, (first, _) in zip(recipe.data.stages, recipe.data.starts[1:], strict=True):
        if first >= state["cursor"]:
            continue
        begin = f"From token {stage.from_tokens:,} on"
        if stage.weights is not None:
            weights = ", ".join(f"{name} {weight:g}" for name, weight in stage.weights.items())
            lines.append(f"{begin} the weights were: {weights}.")
        if stage.sequence_length is not None:
            lines.append(f"{begin} sequences had {stage.sequence_length} tokens.")
        if stage.rope_theta is not None:
            lines.append(f"{begin} the base of rotary positions was {stage.rope_theta:g}.")
    passed = skipped_before(state["cursor"], [(start, end) for start, end in state.get("skip", ())])
    if passed:
        ranges = ", ".join(f"{start} to {end - 1}" for start, end in passed)
        lines.append(f"Positions of the data order that were left out: {ranges}.")
    return "".join(f"\n{line}" for line in lines)


def _evaluation(state: dict[str, Any]) -> str:
    """The latest evaluation in words."""
    evaluation = state.get("evaluation")
    if not evaluation:
        return "No held-out text was evaluated."
    text = f"On held-out documents of the same corpora, at step {evaluation['step']}: {_loss(evaluation)}."
    sets = evaluation.get("sets", {})
    if sets:
        text += "\n\nOn further validation sets:\n"
    return text + "".join(f"\n- {name}: {_loss(numbers)}" for name, numbers in sets.items())


def _loss(numbers: dict[str, Any]) -> str:
    bits = numbers["bits_per_byte"]
    if numbers["loss"] is None:
        return "no loss, for there was nothing to predict"
    return f"loss {numbers['loss']:.4f} nats per token" + ("" if bits is None else f", {bits:.4f} bits per byte")


def _fenced(text: str) -> str:
    """A YAML block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text}\n{fence}"
