"""Numbers of evaluations: for people as tables, for the Hub as results of a model index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult

from lmssl.card.facts import Facts
from lmssl.card.markdown import escaped, table

_NO_RESULTS = ("low", "high", "low_by_byte", "high_by_byte", "context_tokens", "stride_tokens")
"""Measures that qualify others."""

_WORDS = {
    "loss": "loss, nats per target",
    "bits_per_byte": "bits per byte",
    "low": "95 % from",
    "high": "to",
    "num_targets": "targets",
    "num_asked": "questions",
}


def results_section(facts: Facts) -> str:
    """Every evaluation of the exported step."""
    parts = [_held_out(facts)]
    if _is_mean(facts):
        parts.append("These numbers are those of the weights as they were trained, at the last of the steps above.")
    if _is_rounded(facts):
        parts.append(f"All numbers are those of the weights in float32, before they were rounded to {_dtype(facts)}.")
    rows = [
        (row.get("kind"), row.get("name"), _WORDS.get(name, name.replace("_", " ")), _shown(value))
        for row in facts.evaluations
        for name, value in row["metrics"].items()
        if _is_number(value)
    ]
    if rows:
        parts.append(
            f"By `lmssl eval`, of {'these' if _is_rounded(facts) else 'the exported'} weights:\n\n"
            + table(["kind", "what", "measure", "value"], rows)
        )
    return "\n\n".join(parts)


def _held_out(facts: Facts) -> str:
    evaluation = facts.state.get("evaluation")
    if not evaluation or "loss" not in evaluation:
        return "No held-out text was evaluated in training."
    text = f"On held-out documents of the same corpora, at step {evaluation['step']}: {_loss(evaluation)}."
    sets = evaluation.get("sets", {})
    if sets:
        text += "\n\nOn further validation sets:\n"
    return text + "".join(f"\n- {escaped(name)}: {_loss(numbers)}" for name, numbers in sets.items())


def _loss(numbers: Mapping[str, Any]) -> str:
    bits = numbers["bits_per_byte"]
    if numbers["loss"] is None:
        return "no loss, for there was nothing to predict"
    return f"loss {numbers['loss']:.4f} nats per token" + ("" if bits is None else f", {bits:.4f} bits per byte")


def model_index(facts: Facts, task: str) -> list[EvalResult]:
    """The same numbers as the Hub reads them; empty where nothing was measured on these weights."""
    return list(_results(facts, task))


def _is_mean(facts: Facts) -> bool:
    return bool(facts.weights.get("ema")) or facts.weights.get("average", 1) > 1


def _dtype(facts: Facts) -> str:
    return str(facts.weights.get("dtype") or "float32")


def _is_rounded(facts: Facts) -> bool:
    return _dtype(facts) != "float32"


def _results(facts: Facts, task: str) -> Iterator[EvalResult]:
    if _is_rounded(facts):  # none of these numbers is that of the rounded weights
        return
    evaluation = facts.state.get("evaluation") or {}
    if evaluation.get("step") == facts.found.step and not _is_mean(facts):
        sets = {"held-out text of the training corpora": evaluation, **evaluation.get("sets", {})}
        for name, numbers in sets.items():
            for metric in ("loss", "bits_per_byte"):
                if _is_number(numbers.get(metric)):
                    yield _result(task, "held_out", str(name), metric, numbers[metric])
    for row in facts.evaluations:
        for metric, value in row["metrics"].items():
            if _is_number(value) and metric not in _NO_RESULTS and not metric.startswith("num_"):
                yield _result(task, str(row.get("kind")), str(row.get("name")), metric, value)


def _result(task: str, kind: str, name: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=kind,
        dataset_name=name,
        metric_type=metric,
        metric_name=_WORDS.get(metric, metric.replace("_", " ")),
        metric_value=round(float(value), 6),
        verified=False,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
