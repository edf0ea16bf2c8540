"""README.md of an export: front matter that the Hub reads, and the sections that people read."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from ruamel.yaml import YAML

from lmssl import __version__
from lmssl.card.curve import loss_curve
from lmssl.card.facts import Facts
from lmssl.card.markdown import fenced
from lmssl.card.results import model_index, results_section
from lmssl.card.sections import (
    AUTO_CLASSES,
    PREDICTIONS,
    USES,
    cost_section,
    data_section,
    events_section,
    model_section,
    origin,
    weights_section,
)
from lmssl.recipe.load import yaml_text
from lmssl.release.private import shortened

CURVE = "training_curve.svg"
"""The picture's name in an export."""

PIPELINES = {
    **dict.fromkeys(("causal", "prefix", "hybrid"), "text-generation"),
    "masked": "fill-mask",
    "span": "text2text-generation",
    "replaced": "feature-extraction",
}

GENERATOR = """
The folder `generator` holds the smaller model that filled masks for it in training:
`AutoModelForMaskedLM.from_pretrained("PATH_OR_REPO", subfolder="generator")`.
"""


def write_card(folder: Path, facts: Facts) -> None:
    """Write README.md and the loss curve into an export folder."""
    recipe = facts.recipe
    task = PIPELINES[recipe.objective.kind]
    data = ModelCardData(
        library_name="transformers",
        license=recipe.card.license,
        language=list(recipe.card.languages) or None,
        pipeline_tag=task,
        tags=["lmssl", "pretraining", recipe.objective.kind],
        model_name=recipe.name,
        eval_results=model_index(facts, task) or None,
    )
    curve = _curve(facts)
    if curve is not None:
        (folder / CURVE).write_text(curve, encoding="utf-8")
    body = _body(facts, has_curve=curve is not None)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / "README.md")


def _curve(facts: Facts) -> str | None:
    points = {
        kind: [
            (row["tokens"], row["loss"])
            for row in facts.metrics
            if row.get("kind") == kind and isinstance(row.get("loss"), float) and isinstance(row.get("tokens"), int)
        ]
        for kind in ("train", "evaluate")
    }
    return loss_curve(points["train"], points["evaluate"], title=f"Loss of {facts.recipe.name} over training tokens")


def _body(facts: Facts, *, has_curve: bool) -> str:
    kind = facts.recipe.objective.kind
    picture = f"\n![Loss over training tokens]({CURVE})\n" if has_curve else ""
    weights = "".join(f"\n{line}" for line in weights_section(facts))
    return f"""# {facts.recipe.name}

A `{facts.config["model_type"]}` language model with {facts.num_parameters:,} parameters, pretrained {origin(facts)}
with [lmssl](https://pypi.org/project/lmssl/) {__version__} by {PREDICTIONS[kind]}.{weights}

```python
from transformers import {AUTO_CLASSES[kind]}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO")
model = {AUTO_CLASSES[kind]}.from_pretrained("PATH_OR_REPO")
```
{GENERATOR if kind == "replaced" else ""}
## Model
{model_section(facts)}

## Data
{data_section(facts)}

## Evaluation
{results_section(facts)}
{picture}
## Limits
A base model: it {USES[kind]} and follows no instructions. It repeats what its text says, errors and prejudice included,
and knows nothing that is not in it. Nobody has checked it for any use.

## How it was made
{cost_section(facts)}

{events_section(facts)}

The recipe, absolute paths cut to their last part:

{fenced(_recipe(facts), "yaml")}
"""


def _recipe(facts: Facts) -> str:
    """The whole recipe, defaults included, without what tells of people and machines."""
    read = YAML(typ="safe", pure=True).load(facts.found.text("recipe.yaml"))
    return yaml_text(shortened(read)).strip()
