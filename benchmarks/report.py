"""Makes benchmarks/REPORT.md from benchmarks/results/*.jsonl; no number is typed by hand.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data_tables
import gpu_tables
import speed_tables
from cells import spread, where
from scipy import stats

HERE = Path(__file__).parent
STARTS = ("random", "pretrained")
"""What fine-tuning begins from."""


def startup(record: dict[str, Any]) -> str:
    """Wall seconds of commands that must answer at once."""
    lines = ["## Answers at once\n", "| command | seconds |", "| --- | --- |"]
    lines += [f"| `{e['name']}` | {spread(e['seconds'], '.3f')} |" for e in record["entrants"]]
    return "\n".join([*lines, "", where(record)])


def head(record: dict[str, Any]) -> str:
    """Seconds and memory of a step by where the head runs."""
    lines = [
        f"## Masked step, where the head runs, {speed_tables.precision(record)}\n",
        f"BERT {record['size']}, vocabulary 30,528, {record['rows']} sequences of {record['sequence_length']} tokens, "
        f"{record['rate']:.0%} masked; {record['precision']}, compiled; forward and backward, no update. Memory: the "
        "process's peak, compiling included, less what it had before.\n",
        "| head | seconds | memory, MB |",
        "| --- | --- | --- |",
    ]
    for name, rows in record["entrants"].items():
        memory = spread([row["memory_bytes"] / 1e6 for row in rows], ",.0f")
        lines.append(f"| {name} | {spread([row['seconds'] for row in rows], '.3f')} | {memory} |")
    return "\n".join([*lines, "", where(record)])


def quality(record: dict[str, Any]) -> str:
    """Masked loss by time spent."""
    lines = [
        f"## Masked loss by time, {speed_tables.precision(record)}\n",
        f"BERT, {record['model']['num_hidden_layers']} layers of {record['model']['hidden_size']}, on python_docs; "
        f"{record['num_documents']} held-out documents, 15 % masked, the same masks for all. Ours counts its whole "
        "process, compilation included; Trainer counts its steps only.\n",
        "| entrant | seconds | / ours | nats per masked token | the same, documents joined |",
        "| --- | --- | --- | --- | --- |",
    ]
    ours = record["entrants"][0]["seconds"]
    for row in record["entrants"]:
        time = f"{row['seconds']:.0f} | {row['seconds'] / ours:.2f}"
        lines.append(f"| {row['name']} | {time} | {row['loss']:.3f} | {row['loss_joined']:.3f} |")
    return "\n".join([*lines, "", where(record)])


def optim(record: dict[str, Any]) -> str:
    """Muon against AdamW: final losses, and steps for the same loss."""
    steps = f"{record['steps']:,} steps of {record['batch_tokens']:,} tokens"
    rates = (
        f"AdamW's best rate {record['adamw']['lr']:g}; Muon's {record['muon']['lr']:g} for matrices and "
        f"{record['muon']['adamw_lr']:g} for the rest"
    )
    rates += "".join(_edge(record, kind) for kind in ("adamw", "muon"))
    lines = [
        "## Muon against a tuned AdamW\n",
        f"Llama of size {record['size']}, {steps}; held-out loss at the end of a decay. {rates}.\n",
        "| seed | AdamW | Muon | steps of Muon / steps of AdamW for AdamW's loss | seconds of a step, Muon / AdamW |",
        "|---|---|---|---|---|",
    ]
    for row in record["seeds"]:
        ratio = "not reached" if row["steps_ratio"] is None else f"{row['steps_ratio'] or 0.4:.2f}"
        ratio += "" if row["steps_ratio"] != 0 else " or less"
        losses = f"{row['adamw_loss']:.4f} | {row['muon_loss']:.4f}"
        lines.append(f"| {row['seed']} | {losses} | {ratio} | {row['step_seconds_ratio']:.2f} |")
    return "\n".join([*lines, "", where(record)])


def _edge(record: dict[str, Any], kind: str) -> str:
    """What is to be known where a best rate stands at the edge of its grid; a better one may lie beyond."""
    if "grids" in record:
        grid = record["grids"][kind]
    else:  # records of before they had it
        words = record["command"].partition(f"--{kind} ")[2].partition(" --")[0]
        grid = [float(word) for word in words.split()]
    best = record[kind]["lr"]
    if len(grid) < 2 or best not in (min(grid), max(grid)):
        return ""
    tried = ", ".join(f"{rate:g}" for rate in sorted(grid))
    return f"; {kind}'s is at the edge of its grid ({tried}), and a better one may lie beyond"


def transfer(records: list[dict[str, Any]]) -> str:
    """Scores by number of labels, from random and from pretrained weights; the newest setup's runs."""
    newest = [row for row in records if row["setup"] == records[-1]["setup"]]
    records = [row for row in newest if row["purpose"] == "score"]
    first, model, complete = records[0], records[0]["model"], []
    num_seeds = len({row["seed"] for row in records})
    lines = [
        f"## Transfer, {first['objective']}\n",
        f"Fine-tuning {model['kind']}, {model['num_hidden_layers']} layers of {model['hidden_size']}, pretrained on "
        f"{first['pretrain_tokens'] / 1e6:,.0f} M tokens of books, and the same architecture from random weights, on "
        f"the same labels and with as many updates, each at its own best rate. Means over {num_seeds} seeds, which "
        "also draw the labels, with 95 % confidence intervals (Student's t); differences are paired by seed.\n",
        "| task, metric | labels | majority | from random | from pretrained | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task in dict.fromkeys(row["task"] for row in records):
        for size in sorted({row["num_labels"] for row in records if row["task"] == task}):
            rows = [row for row in records if (row["task"], row["num_labels"]) == (task, size)]
            by_start = {start: {row["seed"]: row["score"] for row in rows if row["start"] == start} for start in STARTS}
            both = sorted(by_start["random"].keys() & by_start["pretrained"].keys())
            if not both:
                continue
            ours, theirs = ([by_start[start][seed] for seed in both] for start in ("pretrained", "random"))
            gain = [a - b for a, b in zip(ours, theirs, strict=True)]
            majority = statistics.mean(row["majority"] for row in rows)
            name = f"{task}, {rows[0]['metric']}".replace("_", " ")
            complete += rows
            lines.append(
                f"| {name} | {size:,} | {majority:.3f} | {mean_interval(theirs)} | {mean_interval(ours)} "
                f"| {mean_interval(gain, '+.3f')} |"
            )
    lines += ["", *_rates(newest), *_incomplete(newest, {row["task"] for row in complete})]
    return "\n".join([*lines, where((complete or records)[-1])])


def _rates(records: list[dict[str, Any]]) -> Iterator[str]:
    """Which of the rates that were tried was the best from each start, so that one at an end can be seen."""
    tried = [row for row in records if row["purpose"] == "rate"]
    for task in dict.fromkeys(row["task"] for row in tried):
        chosen = []
        for start in STARTS:
            rows = [row for row in tried if (row["task"], row["start"]) == (task, start)]
            if rows:
                rates = " ".join(f"{lr:g}" for lr in sorted({row["lr"] for row in rows}))
                chosen.append(f"{max(rows, key=lambda row: row['score'])['lr']:g} from {start} (of {rates})")
        yield f"Best rates, {task.replace('_', ' ')}: {'; '.join(chosen)}.\n"


def _incomplete(records: list[dict[str, Any]], complete: set[str]) -> Iterator[str]:
    """What is known of tasks that were not measured to their end, favourable or not."""
    for task in dict.fromkeys(row["task"] for row in records if row["task"] not in complete):
        rows = [row for row in records if row["task"] == task and row["purpose"] == "rate"]
        best = {start: max((row["score"] for row in rows if row["start"] == start), default=None) for start in STARTS}
        if None in best.values():
            known = "nothing can be compared"
        else:
            known = f"one seed, {rows[0]['num_labels']:,} labels, best rates, {rows[0]['metric']} of "
            known += f"{rows[0]['num_scored']:,} validation rows: "
            known += ", ".join(f"from {start} {score:.3f}" for start, score in best.items())
        yield f"Not measured to the end: {task.replace('_', ' ')} ({known}).\n"


def mean_interval(values: list[float], form: str = ".3f") -> str:
    """Mean with half the width of its 95 % confidence interval."""
    if len(values) < 2:
        return f"{values[0]:{form}}"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):{form}} ± {half:.3f}"


def checkpoint(record: dict[str, Any]) -> str:
    """Pauses for saves, and seconds to the first step after a resume."""
    lines = [
        "## Checkpoints\n",
        f"llama of {record['num_parameters']:,} parameters with AdamW, {record['num_bytes'] / 1e6:,.0f} MB a "
        f"checkpoint, {record['threads']} threads. Pause: how long training stands still; whole: until the checkpoint "
        "is on the disk and read back; pairs in turn. Resume: from the start of the command to the end of the first "
        "step, of one short sequence, not compiled.\n",
        "| what | seconds |",
        "| --- | --- |",
    ]
    for name, rows in record["saves"].items():
        for label, key in (("pause", "pause_seconds"), ("whole", "total_seconds")):
            lines.append(f"| {name} save, {label} | {spread([row[key] for row in rows], '.2f')} |")
    lines.append(f"| ratio of the pauses, asynchronous to synchronous | {spread(record['pause_ratio'], '.3f')} |")
    for name, step in (("near", 3), ("far", record["far_step"])):
        lines.append(f"| resume at step {step:,} | {spread(record['resume_seconds'][name], '.2f')} |")
    return "\n".join([*lines, "", where(record)])


def loop(record: dict[str, Any]) -> str:
    """Milliseconds of a step by phase, and what is neither forward, backward nor optimiser."""
    found, whole = record["milliseconds"], sum(record["milliseconds"]["step"])
    given = "".join(f" {override}" for override in record["overrides"])
    lines = [
        "## Loop overhead\n",
        f"`{record['recipe']}`{given} on CPU, {record['steps']:,} steps, the first lines not counted, evaluations and "
        f"saves left out; milliseconds of a step, each the mean of {record['line_steps']}. Overhead: all but forward, "
        "backward and update; less than 3 % of a step is asked for.\n",
        "| phase | milliseconds | share of the time |",
        "| --- | --- | --- |",
    ]
    for name, values in found.items():
        lines.append(f"| {name.replace('_', ' ')} | {spread(values, '.2f')} | {sum(values) / whole:.2%} |")
    return "\n".join([*lines, "", where(record)])


def parity(record: dict[str, Any]) -> str:
    """How far the run under each backend is from that of one process."""
    lines = [
        "## The same run under every backend\n",
        f"Llama of two layers on CPU over gloo, 24 rows of unequal paragraphs a step, {record['steps']} clipped steps. "
        "Largest absolute differences from one process: of the loss of any step or evaluation, and of any number of "
        "the last checkpoint. What is allowed stands in tests/numerics/test_parity.py.\n",
        "| optimiser, precision | backend (processes) | loss | weights | optimiser | averages | loss falls |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        numbers = " | ".join(f"{row[name]:.1e}" for name in ("loss", "model", "optim", "ema"))
        falls = f"{row['first_loss']:.2f} to {row['last_loss']:.2f}"
        lines.append(f"| {row['kind']} | {row['backend']} ({row['processes']}) | {numbers} | {falls} |")
    return "\n".join([*lines, "", where(record)])


TABLES = {
    "train": speed_tables.train,
    "limit": speed_tables.limit,
    "attention": speed_tables.attention,
    "memory": speed_tables.memory,
    "time_to_loss": speed_tables.time_to_loss,
    "scaling": speed_tables.scaling,
    "startup": startup,
    "data": data_tables.data,
    "start": data_tables.start,
    "head": head,
    "quality": quality,
    "optim": optim,
    "checkpoint": checkpoint,
    "loop": loop,
    "parity": parity,
}


def _subject(record: dict[str, Any]) -> str:
    """What a newer record of the same replaces; a processor that trains in float32 says nothing of one with bf16."""
    name: str = record["benchmark"]
    if name.startswith("data,"):
        return f"{name}, {record['text']['name']}"
    apart = name.partition(",")[0] in speed_tables.APART
    return f"{name}, {speed_tables.precision(record)}" if apart else name


def main() -> None:
    """Write the newest record of every benchmark as a table."""
    newest: dict[str, dict[str, Any]] = {}
    transfers: dict[str, list[dict[str, Any]]] = {}
    on_gpu: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((HERE / "results").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["benchmark"] == "optim" and record["kind"] == "run":
                continue
            if record["benchmark"].startswith("gpu, "):
                on_gpu.setdefault(record["benchmark"].removeprefix("gpu, "), []).append(record)
            elif record["benchmark"] == "transfer":
                transfers.setdefault(record["objective"], []).append(record)
            else:
                newest[_subject(record)] = record
    head = (
        "# Benchmarks\n\nMade by `python benchmarks/report.py` from `benchmarks/results/`. Medians, with minimum and "
        "maximum in brackets. Ratios are to the first baseline, round by round, because machines drift.\n"
    )
    tables = [TABLES[name.partition(",")[0]](record) for name, record in newest.items()]
    tables += [transfer(records) for records in transfers.values()]
    tables += gpu_tables.tables(on_gpu)
    (HERE / "REPORT.md").write_text("\n".join([head, *tables]), encoding="utf-8")


if __name__ == "__main__":
    main()
