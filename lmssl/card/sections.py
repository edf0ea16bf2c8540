"""The sections of a card, each from what the run's folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmssl.card.cost import OVERHEAD, cost
from lmssl.card.facts import Facts
from lmssl.card.markdown import escaped, table
from lmssl.data.order import skipped_before
from lmssl.recipe.family import ContinuedModel
from lmssl.tokenizer.load import load_tokenizer

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
USES = {
    **dict.fromkeys(("causal", "prefix", "hybrid"), "continues text"),
    "masked": "fills masks",
    "span": "fills gaps",
    "replaced": "finds replaced tokens",
}

_SIZES = (
    ("hidden_size n_embd dim d_model", "width"),
    ("num_hidden_layers n_layer n_layers num_layers", "layers"),
    ("num_attention_heads n_head n_heads num_heads", "attention heads"),
    ("num_key_value_heads", "key-value heads"),
    ("intermediate_size n_inner hidden_dim d_ff", "width inside a layer"),
    ("max_position_embeddings n_positions", "longest text, tokens"),
    ("vocab_size", "rows of the vocabulary"),
)

_REASONS = {
    "num_dropped_short": "too short",
    "num_dropped_long": "too long",
    "num_dropped_duplicates": "duplicates",
    "num_dropped_overlaps": "with evaluation text",
}


def origin(facts: Facts) -> str:
    """What the weights were before the first step; of a folder its name only, for paths tell of other things."""
    model = facts.recipe.model
    if not isinstance(model, ContinuedModel):
        return "from random weights"
    taken = next((str(row["model_from"]) for row in facts.sessions if "model_from" in row), model.source)
    name = taken if " at commit " in taken else Path(model.source).name
    return f"further, from the weights of {escaped(name)},"


def weights_section(facts: Facts) -> list[str]:
    """Sentences on what is special about the weights; mostly none."""
    ema, average, dtype = (facts.weights.get(name) for name in ("ema", "average", "dtype"))
    lines = []
    if ema:
        decay = facts.recipe.train.ema_decay or 0.0
        lines.append(f"The weights are a moving average over training steps (decay {decay:g}).")
    if isinstance(average, int) and average > 1:
        lines.append(
            f"The weights are the mean of those of the last {average} checkpoints, up to step {facts.found.step:,}."
        )
    if dtype not in (None, "float32"):
        lines.append(f"They were trained in float32 and are rounded to {dtype} here.")
    return lines


def model_section(facts: Facts) -> str:
    """Sizes and tokenizer."""
    rows: list[tuple[str, str]] = [("parameters", f"{facts.num_parameters:,}")]
    for keys, words in _SIZES:
        value = next((facts.config[key] for key in keys.split() if isinstance(facts.config.get(key), int)), None)
        if value is not None:
            rows.append((words, f"{value:,}"))
    tied = facts.config.get("tie_word_embeddings")
    rows.append(("output matrix", "the embedding" if tied else "one of its own"))
    tokenizer = load_tokenizer(facts.run / "tokenizer")
    kind = type(tokenizer.backend.model).__name__
    text = f"Tokenizer: {kind}, {tokenizer.num_tokens:,} tokens, sha256 `{tokenizer.fingerprint[:16]}`."
    return f"{table(['', ''], rows)}\n\n{text}"


def data_section(facts: Facts) -> str:
    """The mixture as it was read, and how it was cut into sequences."""
    recipe, state = facts.recipe, facts.state
    epochs = state.get("epochs") or {}
    rows = []
    for corpus in recipe.data.mixture:
        share = facts.shares.get(corpus.name)
        rows.append(
            (
                corpus.name,
                corpus.kind,
                "by size" if corpus.weight is None else f"{corpus.weight:g}",
                f"{epochs[corpus.name]:.2f}" if corpus.name in epochs else "unknown",
                "unknown" if share is None else f"{share:.2%}",
            )
        )
    attention = "on" if recipe.data.document_attention else "off"
    return f"""{table(["corpus", "kind", "weight", "epochs", "share of what was read"], rows)}

Trained on {state["tokens_seen"]:,} tokens in {facts.found.step:,} steps, in sequences of {recipe.data.sequence_length},
packing `{recipe.data.packing}`, document attention {attention}.{_left_out(facts)}{_changes(facts)}"""


def _left_out(facts: Facts) -> str:
    """How many records were unreadable, and what filters dropped, by reason."""
    counts = dict(facts.left_out)
    if not counts:
        return ""
    bad = counts.pop("num_bad")
    reasons = [
        f"{count:,} {_REASONS.get(name, name.removeprefix('num_dropped_'))}" for name, count in counts.items() if count
    ]
    by_reason = f": {', '.join(reasons)}" if reasons else ""
    return (
        f"\nOf the text that was opened, {bad:,} records were unreadable, and filters left out "
        f"{sum(counts.values()):,} documents{by_reason}."
    )


def _changes(facts: Facts) -> str:
    """Sentences on temperature, limits of epochs, stages that have begun and positions left out; mostly none."""
    recipe, state = facts.recipe, facts.state
    lines = []
    if recipe.data.temperature is not None:
        lines.append(f"Weights were evened out by a temperature of {recipe.data.temperature:g}.")
    limits = [f"{escaped(c.name)} {c.max_epochs:g}" for c in recipe.data.mixture if c.max_epochs is not None]
    if limits:
        lines.append(f"Shares were lowered to keep to at most so many epochs: {', '.join(limits)}.")
    for stage, (first, _) in zip(recipe.data.stages, recipe.data.starts[1:], strict=True):
        if first >= state["cursor"]:
            continue
        begin = f"From token {stage.from_tokens:,} on"
        if stage.weights is not None:
            weights = ", ".join(f"{escaped(name)} {weight:g}" for name, weight in stage.weights.items())
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


def cost_section(facts: Facts) -> str:
    """Hardware, hours, operations and energy."""
    found = cost(facts)
    rows = [("devices", found.devices), ("hours", f"{found.hours:,.3g}" if found.hours else "unknown")]
    rows.append(
        ("operations of training", "unknown" if found.flops is None else f"{found.flops:.3g} FLOPs, by formula")
    )
    if found.kilowatt_hours is None:
        rows.append(("energy", "not estimated: the power of the device is not known"))
    else:
        assumed = f"at {found.watts} W a device all the time, times {OVERHEAD:g} for the data centre; hosts not counted"
        rows.append(("energy, estimated", f"{found.kilowatt_hours:,.3g} kWh {assumed}"))
    versions = facts.sessions[-1].get("versions") if facts.sessions else None
    names = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "unknown"
    rows.append(("versions", names))
    return table(["", ""], rows)


def events_section(facts: Facts) -> str:
    """What went out of line: skipped steps, spikes, ways back."""
    rows = [row for row in facts.metrics if row.get("kind") == "guard"]
    skipped = facts.state.get("skipped_steps", 0)
    lines = [f"Steps skipped for non-finite numbers: {skipped}."]
    overflows = [row for row in rows if row.get("action") == "overflow"]
    if overflows:
        lines.append(f"Steps left out because float16 overflowed, as its loss scale wants: {len(overflows)}.")
    others = [row for row in rows if row.get("action") != "overflow"]
    shown = others[:20]
    text = " ".join(lines)
    if shown:
        cells = [(row.get("step"), row.get("action"), row.get("reason", ""), _positions(row)) for row in shown]
        text += "\n\n" + table(["step", "what was done", "why", "positions of the data order"], cells)
    if len(others) > len(shown):
        text += f"\n\nand {len(others) - len(shown)} more."
    return text


def _positions(row: dict[str, Any]) -> str:
    ends = row.get("positions") or row.get("skip")
    return f"{ends[0]} to {ends[1]}" if isinstance(ends, list) and len(ends) == 2 else ""
