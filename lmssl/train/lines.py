"""What a run says in words and in rows: at its beginning, of an evaluation, at its end."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lmssl.evaluate.loss import LossResult
from lmssl.train.session import Session

_SHOWN_CHARACTERS = 160


def opening_lines(session: Session) -> list[str]:
    """What a person wants to know before the first step."""
    recipe, accelerator = session.recipe, session.accelerator
    num_parameters = sum(p.numel() for p in session.core.parameters())
    name = type(session.core.model).__name__
    processes = f" x {accelerator.num_processes}" if accelerator.num_processes > 1 else ""
    sizes = [f"{recipe.batches.num_tokens(step):,}" for step in (0, max(0, recipe.steps - 1))]
    where = f"{accelerator.device.type}{processes}, {recipe.train.precision}, compile {session.compiled}"
    return [
        f"{recipe.name}: {name}, {num_parameters:,} parameters on {where}",
        f"{recipe.steps:,} steps of {' to '.join(dict.fromkeys(sizes))} tokens; run folder {session.run}",
    ]


def closing_line(session: Session) -> str:
    """What was read, how often each corpus, and what of it was padding, cut or unreadable."""
    state = session.state
    totals = session.stream.totals(state.cursor)
    epochs = ", ".join(f"{name} {count:.2f}" for name, count in session.stream.epochs_at(state.cursor).items())
    guarded = f", {state.spikes:,} spikes" if state.spikes else ""
    guarded += f", {len(state.rollbacks):,} rollbacks" if state.rollbacks else ""
    return (
        f"opened {totals.num_documents:,} documents, {totals.num_tokens:,} tokens; padding {totals.padding_ratio:.2%}, "
        f"{totals.num_cut_documents:,} cut documents, {totals.num_bad_records:,} bad records, "
        f"{state.skipped_steps:,} skipped steps{guarded}; epochs: {epochs}"
    )


def evaluation_row(results: dict[str, LossResult], sets: Collection[str]) -> dict[str, Any]:
    """The numbers of an evaluation: of all held-out text, by corpus, and by validation set."""
    whole = results[""]
    row: dict[str, Any] = {"loss": whole.loss, "bits_per_byte": whole.bits_per_byte, "num_targets": whole.num_targets}
    row |= whole.further
    by_name = {
        name: {"loss": r.loss, "bits_per_byte": r.bits_per_byte, **r.further} for name, r in results.items() if name
    }
    row["corpora"] = {name: numbers for name, numbers in by_name.items() if name not in sets}
    if sets:
        row["sets"] = {name: numbers for name, numbers in by_name.items() if name in sets}
    return row


def answer_lines(row: dict[str, Any]) -> list[str]:
    """A suite's result for the console, with its first numbers; of samples their texts, cut short.

    >>> answer_lines({"name": "blimp", "step": 500, "metrics": {"accuracy": 0.6123, "low": 0.6, "num_ties": 0}})
    ['blimp at step 500: accuracy 0.6123  low 0.6000']
    >>> answer_lines({"name": "samples", "step": 500, "samples": [{"text": "The for" + chr(10) + "statement"}]})
    ['sample at step 500: The for statement']
    """
    if "samples" in row:
        texts = ("".join(c if c.isprintable() else " " for c in sample["text"]) for sample in row["samples"])
        cut = (f"{text[:_SHOWN_CHARACTERS]}..." if len(text) > _SHOWN_CHARACTERS else text for text in texts)
        return [f"sample at step {row['step']}: {text}" for text in cut]
    numbers = [f"{key} {value:.4f}" for key, value in row["metrics"].items() if isinstance(value, float)]
    return [f"{row['name']} at step {row['step']}: " + "  ".join(numbers[:3])]


def tracked_answer(row: dict[str, Any]) -> dict[str, Any]:
    """The same for trackers: numbers, and texts under `sample/1` and so on."""
    found: dict[str, Any] = {f"{row['name']}/{key}": value for key, value in row["metrics"].items()}
    texts = {f"sample/{number}": sample["text"] for number, sample in enumerate(row.get("samples", ()), start=1)}
    return found | texts | {"step": row["step"]}


def answer_row(answer: dict[str, Any], *, tokens: int) -> dict[str, Any]:
    """A line of `evaluations.jsonl` as one of `metrics.jsonl`: the same for equal runs."""
    row = {"kind": "suite", "step": answer["step"], "tokens": tokens, "evaluation": answer["kind"]}
    return row | {key: answer[key] for key in ("name", "metrics", "parts", "samples") if key in answer}


def evaluation_line(row: dict[str, Any]) -> str:
    """A row of an evaluation for the console."""
    bits = "" if row["bits_per_byte"] is None else f"  bits/byte {row['bits_per_byte']:.3f}"
    loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
    return f"validation at step {row['step']}: loss {loss}{bits}  ({row['num_targets']:,} targets)"
