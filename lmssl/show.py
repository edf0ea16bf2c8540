"""A resolved recipe as a person reads it: every value with its origin, and the numbers that follow.

Answers at once: sizes come from closed formulas and the vocabulary from `tokenizer.json` itself, so neither torch nor
transformers is imported unless the real model is asked for.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lmssl.model import flops
from lmssl.model.roles import Count, role_counts
from lmssl.model.source import stand_in
from lmssl.recipe.batches import kept_before
from lmssl.recipe.encoders import RobertaModel
from lmssl.recipe.load import Loaded, flat
from lmssl.recipe.objective import AnyObjective, HybridObjective, Masks, SpanObjective
from lmssl.recipe.optim import ROLES, Role, role_rates
from lmssl.recipe.schedule import ConstantSchedule, WsdSchedule
from lmssl.recipe.sections import Recipe, derived_fields
from lmssl.recipe.source import Origin
from lmssl.shipped import find

_MOST_VALUE_WIDTH = 44


@dataclass(frozen=True)
class Number:
    """One derived number; `value` is None where it cannot be known yet, and `how` says why."""

    name: str
    value: int | float | None
    how: str

    @property
    def text(self) -> str:
        """The value as people read it."""
        if self.value is None:
            return "unknown"
        if isinstance(self.value, float):
            return f"{self.value:.3g}"
        return f"{self.value:,}" if self.value < 1e15 else f"{self.value:.3e}"


def derived_numbers(recipe: Recipe) -> list[Number]:
    """What follows from the recipe and, if it is there, its tokenizer."""
    return [*_step_numbers(recipe), *_size_numbers(recipe)]


class Built(NamedTuple):
    """What the real model says, built without weights."""

    number: Number
    """Its parameters."""
    counts: dict[Role, Count]
    """Its tensors and parameters by role."""


def built_model(recipe: Recipe) -> Built:
    """Count the real model, built without weights; imports torch and transformers.

    Raises:
        LmsslError: the tokenizer is missing or the model cannot be built.
    """
    from lmssl.model.build import build_recipe_model
    from lmssl.model.continued import recipe_config
    from lmssl.optim.groups import parameter_roles
    from lmssl.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(find(recipe.tokenizer.path))
    config = recipe_config(recipe, tokenizer)
    model = build_recipe_model(recipe, config, device="meta")
    built = sum(parameter.numel() for parameter in model.parameters())
    how = f"{type(model).__name__}, built without weights"
    section, _ = stand_in(recipe.model)
    if flops.has_formula(section):
        counted = flops.trained_parameters(
            section,
            recipe.objective,
            vocab_size=config.vocab_size,
            sequence_length=recipe.data.longest_sequence,
            pad_id=tokenizer.pad_id,
        ).total
        how += ", equal to the formula" if counted == built else f"; the formula is off by {counted - built:+,}"
    sizes: dict[Role, list[int]] = {role: [] for role in ROLES}
    for name, role in parameter_roles(model).items():
        sizes[role].append(model.get_parameter(name).numel())
    counts = {role: Count(len(found), sum(found)) for role, found in sizes.items()}
    return Built(Number("parameters_built", built, how), counts)


def as_text(loaded: Loaded, numbers: list[Number], counts: dict[Role, Count] | None = None) -> str:
    """The recipe as an aligned tree of key, value and origin, then the derived numbers and the parameters by role.

    Args:
        counts: of the built model; None: by formula, where there is one.
    """
    rows = [*_tree_rows(loaded), ("", "", ""), ("derived", "", "")]
    rows += [(f"  {number.name}", number.text, number.how) for number in numbers]
    keys = max(len(key) for key, _, _ in rows)
    values = max(len(value) for _, value, _ in rows if len(value) <= _MOST_VALUE_WIDTH)
    lines = [f"{loaded.recipe.name}, from {loaded.path}", ""]
    lines += [f"{key:<{keys}}  {value:<{values}}  {note}".rstrip() for key, value, note in rows]
    return "\n".join([*lines, "", *_group_lines(loaded.recipe, counts)])


def _group_lines(recipe: Recipe, counts: dict[Role, Count] | None) -> list[str]:
    """The groups as a table; roles that the model has none of are left out."""
    table = [("parameters", "tensors", "count", "optimizer", "peak lr", "weight decay")]
    for role, group in parameter_groups(recipe, counts).items():
        if group["tensors"] == 0:
            continue
        numbers = ["unknown" if group[key] is None else f"{group[key]:,}" for key in ("tensors", "parameters")]
        table.append((f"  {role}", *numbers, group["optimizer"], f"{group['peak_lr']:g}", f"{group['weight_decay']:g}"))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) if n in (0, 3) else cell.rjust(width) for n, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in table)
    ]


def parameter_groups(recipe: Recipe, counts: dict[Role, Count] | None = None) -> dict[Role, dict[str, Any]]:
    """How each role is updated, and how many tensors and parameters it has; None where that cannot be known.

    Args:
        counts: of the built model; None: by formula, where there is one.
    """
    found = counts or _role_counts(recipe)
    return {
        role: {"tensors": found and found[role].num_tensors, "parameters": found and found[role].num_parameters}
        | rates._asdict()
        for role, rates in role_rates(recipe.optim).items()
    }


def _role_counts(recipe: Recipe) -> dict[Role, Count] | None:
    vocabulary, (model, _), pad_id = _vocabulary(recipe), stand_in(recipe.model), _pad_id(recipe)
    unknown = isinstance(model, RobertaModel) and model.max_position_embeddings is None and pad_id is None
    if vocabulary.value is None or not flops.has_formula(model) or unknown:
        return None
    rows, length = int(vocabulary.value), recipe.data.longest_sequence
    return role_counts(model, recipe.objective, vocab_size=rows, sequence_length=length, pad_id=pad_id)


def as_json(loaded: Loaded, numbers: list[Number], counts: dict[Role, Count] | None = None) -> str:
    """The same as one JSON object: `recipe`, `origins` by dotted path, `derived` by name, `parameters` by role."""
    content = {
        "path": str(loaded.path),
        "recipe": loaded.recipe.model_dump(mode="json", by_alias=True),
        "origins": {path: _origin_json(origin) for path, origin in loaded.origins.items()},
        "fields": derived_fields(loaded.recipe),
        "derived": {number.name: number.value for number in numbers},
        "parameters": parameter_groups(loaded.recipe, counts),
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def _step_numbers(recipe: Recipe) -> list[Number]:
    train, schedule = recipe.train, recipe.schedule
    plan = recipe.batches
    warmup = plan.step_at_token(schedule.warmup_tokens - 1) + 1 if schedule.warmup_tokens else 0
    if isinstance(schedule, WsdSchedule):
        decay, how = math.ceil(schedule.decay_ratio * train.tokens / train.batch_tokens), f"the last, {schedule.decay}"
    elif isinstance(schedule, ConstantSchedule):
        decay, how = 0, "the rate stays at its peak"
    else:
        decay, how = recipe.steps - warmup, f"all after the warmup, {schedule.kind}"
    accumulation = math.ceil(recipe.batch_sequences / train.micro_batch_sequences)
    later = [
        Number(
            f"stage_{number}_step",
            plan.step_at(kept_before(first, recipe.data.skip)),
            "whole steps before data.stages begins",
        )
        for number, (first, _) in enumerate(recipe.data.starts[1:], 1)
    ]
    if train.batch_warmup is not None:
        growing = next(span.first_step for span in plan.spans if span.num_tokens == train.batch_tokens)
        later += [
            Number("first_batch_sequences", plan.num_sequences(0), "batch_warmup.from_tokens / data.sequence_length"),
            Number("batch_warmup_steps", growing, "before steps have train.batch_tokens"),
        ]
    if recipe.data.skip:
        later.append(Number("skipped_positions", sum(end - start for start, end in recipe.data.skip), "data.skip"))
    return [
        Number("steps", recipe.steps, "train.tokens / train.batch_tokens, rounded up"),
        Number("warmup_steps", warmup, "schedule.warmup_tokens / train.batch_tokens"),
        Number("decay_steps", decay, how),
        Number("batch_sequences", recipe.batch_sequences, "train.batch_tokens / data.sequence_length"),
        Number("accumulation", accumulation, "micro-batches of one step on one device"),
        *later,
    ]


def _size_numbers(recipe: Recipe) -> list[Number]:
    vocabulary = _vocabulary(recipe)
    names = ("parameters", "flops_per_token", "total_flops", "tokens_per_parameter", "training_bytes")
    if vocabulary.value is None:
        return [vocabulary, *(Number(name, None, "needs the vocabulary") for name in names)]
    length, rows = recipe.data.longest_sequence, int(vocabulary.value)
    model, why = stand_in(recipe.model)
    if not flops.has_formula(model):
        why = f"{why or f'no formula for {recipe.model.kind}'}; --model builds and counts it"
        return [vocabulary, *(Number(name, None, why) for name in names)]
    pad_id = _pad_id(recipe)
    if isinstance(model, RobertaModel) and model.max_position_embeddings is None and pad_id is None:
        why = "roberta's positions begin after the pad token, and the tokenizer has none"
        return [vocabulary, *(Number(name, None, why) for name in names)]
    objective, ratio = recipe.objective, target_ratio(recipe.objective)
    parameters = flops.trained_parameters(model, objective, vocab_size=rows, sequence_length=length, pad_id=pad_id)
    by_length = {
        length: flops.trained_flops_per_token(
            model, objective, vocab_size=rows, sequence_length=length, target_ratio=ratio
        )
        for length in recipe.batches.tokens_by_length()
    }
    per_token = by_length[recipe.data.sequence_length]
    total = sum(by_length[length] * count for length, count in recipe.batches.tokens_by_length().items())
    head = f"head {parameters.head:,}" if parameters.head else "head shared"
    head += ", generator included" if objective.kind == "replaced" else ""
    return [
        vocabulary,
        Number("parameters", parameters.total, f"body {parameters.body:,}, embedding {parameters.embedding:,}, {head}"),
        Number("flops_per_token", per_token, _flops_note(recipe.objective, ratio)),
        Number("total_flops", total, "flops_per_token x tokens of all steps"),
        Number("tokens_per_parameter", recipe.train.tokens / parameters.total, "20 is compute-optimal for training"),
        _training_bytes(recipe, parameters.total),
    ]


def _training_bytes(recipe: Recipe, num_parameters: int) -> Number:
    if recipe.optim.kind == "adamw":
        memory, how = flops.training_memory(num_parameters), "weights, gradients and AdamW in fp32"
    else:
        counts = _role_counts(recipe)
        num_matrices = counts["matrix"].num_parameters if counts else 0
        memory = flops.training_memory(num_parameters, num_one_state=num_matrices)
        how = f"weights, gradients, {recipe.optim.kind} and AdamW in fp32"
    return Number("training_bytes", memory.total, how)


def target_ratio(objective: AnyObjective) -> float:
    """Tokens that the head runs at / tokens, over the whole run; in span corruption the decoder's / the encoder's."""
    if isinstance(objective, SpanObjective):
        sentinels = objective.rate / objective.mean_span_tokens
        return (objective.rate + sentinels) / (1 - objective.rate + sentinels)
    if not isinstance(objective, Masks):
        return 1.0
    rate = objective.rate
    if objective.final_rate is not None:
        rate += objective.decay_ratio * (objective.final_rate - rate) / 2
    if isinstance(objective, HybridObjective):
        return 1 - objective.masked_ratio + objective.masked_ratio * rate
    return rate


def _flops_note(objective: AnyObjective, ratio: float) -> str:
    if isinstance(objective, SpanObjective):
        return f"forward and backward, the decoder's {ratio:.3g} tokens for each of the encoder's included"
    if objective.kind == "replaced":
        return f"forward and backward of generator and model, the generator's head at {ratio:.3g} of the tokens"
    if objective.kind == "masked":
        return f"forward and backward, attention both ways, head and end of last layer at {ratio:.3g} of the tokens"
    if objective.kind == "hybrid":
        return f"forward and backward, causal attention, the head at {ratio:.3g} of the tokens"
    return "forward and backward, causal attention"


def _pad_id(recipe: Recipe) -> int | None:
    """The pad id as the tokenizer's folder says, without loading the tokenizer; None if that cannot be read."""
    folder = find(recipe.tokenizer.path)
    try:
        token = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["pad_token"]
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        token = token["content"] if isinstance(token, dict) else token
        return next((int(added["id"]) for added in content["added_tokens"] if added["content"] == token), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _vocabulary(recipe: Recipe) -> Number:
    if recipe.model.vocab_size is not None:
        return Number("vocab_size", recipe.model.vocab_size, "model.vocab_size")
    folder = find(recipe.tokenizer.path)
    file = folder / "tokenizer.json"
    try:
        num_tokens = _num_tokens(file)
    except FileNotFoundError:
        return Number("vocab_size", None, f"there is no {file}; build it with `lmssl tokenizer`")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Number("vocab_size", None, f"{file} cannot be read as a tokenizer")
    own = stand_in(recipe.model)[0].vocab_size
    if own is not None and own >= num_tokens:
        return Number("vocab_size", own, "rows of the model that is continued")
    how = f"{num_tokens:,} tokens of {recipe.tokenizer.path}, up to a multiple of {recipe.tokenizer.pad_to_multiple}"
    return Number("vocab_size", recipe.vocab_size(num_tokens), how)


def _num_tokens(file: Path) -> int:
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    # Unigram stores a list in the order of ids, the others a mapping to ids.
    last = len(vocabulary) - 1 if isinstance(vocabulary, list) else max(vocabulary.values())
    return int(max([last, *(int(token["id"]) for token in content["added_tokens"])])) + 1


def _tree_rows(loaded: Loaded) -> list[tuple[str, str, str]]:
    derived = derived_fields(loaded.recipe)
    rows: list[tuple[str, str, str]] = []
    above: tuple[str, ...] = ()
    for path, value in flat(loaded.recipe).items():
        parts = tuple(path.split("."))
        for depth, part in enumerate(parts[:-1]):
            if above[: depth + 1] != parts[: depth + 1]:
                rows.append(("  " * depth + part, "", ""))
        above = parts[:-1]
        origin = loaded.origins[path]
        shown = derived.get(path, value) if origin.kind == "derived" else value
        rows.append(("  " * (len(parts) - 1) + parts[-1], _value(shown), str(origin)))
    return rows


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_value(part) for part in value) + "]"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return f"{value:_}" if isinstance(value, int) else str(value)


def _origin_json(origin: Origin) -> dict[str, Any]:
    return {"kind": origin.kind} if origin.mark is None else {"kind": origin.kind, "mark": origin.mark}
