"""From a recipe to its objective."""

from __future__ import annotations

import pytest

from lmssl.objective.build import build_objective
from lmssl.objective.hybrid import HybridObjective
from lmssl.objective.prefix import PrefixObjective
from lmssl.objective.replaced import ReplacedObjective
from lmssl.objective.sentence import SentenceObjective
from lmssl.objective.span import SpanObjective
from lmssl.recipe.load import load_recipe
from lmssl.shipped import shipped_root
from lmssl.tokenizer.load import load_tokenizer


@pytest.mark.parametrize(
    ("name", "kind", "terms"),
    [
        ("prefix-llama", PrefixObjective, {"prefix": 1.0}),
        ("hybrid-llama", HybridObjective, {"causal": 0.75, "masked": 0.25}),
        ("span-t5", SpanObjective, {"span": 1.0}),
        ("replaced-electra", ReplacedObjective, {"masked": 1.0, "replaced": 20.0}),
        ("sentence-bert", SentenceObjective, {"masked": 1.0, "sentence": 1.0}),
    ],
)
def test_what_the_recipe_says_arrives(name: str, kind: type, terms: dict[str, float]) -> None:
    changes = {
        "prefix-llama": ["objective.min_prefix_ratio=0.2", "objective.max_prefix_ratio=0.7"],
        "hybrid-llama": ["objective.masked_ratio=0.25"],
        "span-t5": ["objective.rate=0.3", "objective.mean_span_tokens=5"],
        "replaced-electra": ["objective.detection_weight=20", "objective.temperature=0.5"],
        "sentence-bert": ["objective.sentence_task=order"],
    }[name]
    recipe = load_recipe(shipped_root() / f"recipes/debug/{name}.yaml", [*changes, "data.seed=3"]).recipe
    found = build_objective(recipe, load_tokenizer(shipped_root() / recipe.tokenizer.path), num_positions=100)
    assert isinstance(found, kind)
    assert found.weights == terms
    match found:
        case PrefixObjective():
            assert (found.seed, found.min_prefix_ratio, found.max_prefix_ratio) == (3, 0.2, 0.7)
        case HybridObjective():
            assert (found.seed, found.masking.seed, found.masking.num_positions) == (3, 3, 100)
        case ReplacedObjective():
            assert (found.masking.seed, found.masking.num_positions, found.temperature) == (3, 100, 0.5)
        case SentenceObjective():
            assert (found.masking.seed, found.pairs.seed, found.pairs.task) == (3, 3, "order")
        case SpanObjective():
            corruption = found.corruption
            assert (corruption.seed, corruption.rate, corruption.mean_span_tokens) == (3, 0.3, 5.0)
