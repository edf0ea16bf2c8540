"""From the recipe's `objective` section to an objective."""

from __future__ import annotations

from lmssl.objective.base import Objective
from lmssl.objective.causal import CausalObjective
from lmssl.objective.hybrid import HybridObjective
from lmssl.objective.masked import MaskedObjective
from lmssl.objective.masking import Masking
from lmssl.objective.pairs import Pairs
from lmssl.objective.prefix import PrefixObjective
from lmssl.objective.replaced import ReplacedObjective
from lmssl.objective.sentence import SentenceObjective
from lmssl.objective.span import Corruption, SpanObjective
from lmssl.recipe import objective as sections
from lmssl.recipe.sections import Recipe
from lmssl.tokenizer.load import Tokenizer
from lmssl.tokenizer.offsets import surface_bytes
from lmssl.tokenizer.words import WordStarts


def build_objective(recipe: Recipe, tokenizer: Tokenizer, *, num_positions: int) -> Objective:
    """The objective of a recipe.

    Args:
        num_positions: of the whole run, skipped ones included; schedules of masking rates follow them.

    Raises:
        TokenizerError: the objective needs a token that the tokenizer lacks, or words, and its tokens show none.
    """
    documents = recipe.data.document_attention
    match recipe.objective:
        case sections.CausalObjective():
            return CausalObjective(document_attention=documents)
        case sections.MaskedObjective() as section:
            masking = Masking.of(section, tokenizer, recipe.data_seed, num_positions)
            if section.sentence_task is not None:
                pairs = Pairs(section.sentence_task, recipe.data_seed, WordStarts.of(tokenizer))
                return SentenceObjective(masking, surface_bytes(tokenizer), documents, pairs=pairs)
            return MaskedObjective(masking, surface_bytes(tokenizer), documents)
        case sections.ReplacedObjective() as section:
            masking = Masking.of(section, tokenizer, recipe.data_seed, num_positions)
            detection = section.detection_weight, section.temperature
            return ReplacedObjective(masking, surface_bytes(tokenizer), *detection, documents)
        case sections.HybridObjective() as section:
            masking = Masking.of(section, tokenizer, recipe.data_seed, num_positions)
            return HybridObjective(masking, recipe.data_seed, section.masked_ratio)
        case sections.PrefixObjective() as section:
            ratios = section.min_prefix_ratio, section.max_prefix_ratio
            return PrefixObjective(surface_bytes(tokenizer), recipe.data_seed, *ratios)
        case sections.SpanObjective() as section:
            return SpanObjective(Corruption.of(section, tokenizer, recipe.data_seed), surface_bytes(tokenizer))
