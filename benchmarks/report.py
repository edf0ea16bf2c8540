"""Makes benchmarks/REPORT.md from benchmarks/results/*.jsonl; no number is typed by hand.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def spread(values: list[float], form: str) -> str:
    """Median with minimum and maximum."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def where(record: dict[str, Any]) -> str:
    """One line about date, machine and command."""
    machine = record["machine"]
    versions = ", ".join(f"{k} {machine[k]}" for k in ("torch", "transformers", "accelerate", "tokenizers"))
    return (
        f"{record['date']}; {machine['cpu']}, {machine['cores']} cores; Python {machine['python']}, {versions}.\n"
        f"Reproduce: `{record['command']}`\n"
    )


def train(record: dict[str, Any]) -> str:
    """Training rates, median over rounds with the range; the ratio is taken round by round."""
    model = record["model"]
    rate = record.get("rate")
    masked = "" if rate is None else f", {rate:.0%} of them masked"
    shape = f"{model['num_hidden_layers']} layers of {model['hidden_size']}, vocabulary {model['vocab_size']:,}"
    batch = f"{record['rows']} sequences of {record['sequence_length']} tokens a step"
    lines = [
        f"## Training, {'causal' if rate is None else 'masked'}, CPU\n",
        f"{model['kind']}, {shape}; {batch}{masked}; {record['steps']} steps, "
        f"the first {record['warmup']} not counted; same text (python_docs), tokenizer and threads, processes in "
        "turn.\n",
        "| entrant | tokens/s | ratio | seconds to the first step's end |",
        "| --- | --- | --- | --- |",
    ]
    for entrant in record["entrants"]:
        lines.append(
            f"| {entrant['name']} | {spread(entrant['tokens_per_second'], ',.0f')} "
            f"| {spread(entrant['ratio_to_defaults'], '.2f')} | {spread(entrant['first_step_seconds'], '.1f')} |"
        )
    return "\n".join([*lines, "", where(record)])


def startup(record: dict[str, Any]) -> str:
    """Wall seconds of commands that must answer at once."""
    lines = ["## Answers at once\n", "| command | seconds |", "| --- | --- |"]
    lines += [f"| `{e['name']}` | {spread(e['seconds'], '.3f')} |" for e in record["entrants"]]
    return "\n".join([*lines, "", where(record)])


def data(record: dict[str, Any]) -> str:
    """Corpus to packed sequences on disk; the ratio is taken round by round."""
    text, count = record["text"], record["processes"]
    lines = [
        f"## Data, {record['tokenizer']}\n",
        f"Corpus -> sequences of {record['sequence_length']:,} tokens on disk: {text['name']}, "
        f"{text['bytes'] / 1e6:,.0f} MB of text (sha256 {text['sha256']}); {count} processes or threads; imports "
        "are not counted, starting workers and loading the tokenizer are. Reading: sequences at random places from a "
        "warm page cache, one process.\n",
        "| entrant | M tokens/s, per core | MB/s, per core | ratio | reading, M tokens/s | padding |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for entrant in record["entrants"]:
        tokens = [rate / 1e6 / count for rate in entrant["tokens_per_second"]]
        megabytes = [rate / 1e6 / count for rate in entrant["bytes_per_second"]]
        ratio = spread(entrant["ratio_to_baseline"], ".1f") if entrant["ratio_to_baseline"] else ""
        reads = entrant["read_tokens_per_second"]
        reading = spread([rate / 1e6 for rate in reads], ".1f") if reads else ""
        padding = "" if entrant["padding_ratio"] is None else f"{entrant['padding_ratio']:.3%}"
        lines.append(
            f"| {entrant['name']} | {spread(tokens, '.2f')} | {spread(megabytes, '.1f')} | {ratio} | {reading} "
            f"| {padding} |"
        )
    return "\n".join([*lines, "", where(record)])


def start(record: dict[str, Any]) -> str:
    """Seconds to the first batch and peak memory."""
    text = record["text"]
    lines = [
        "## Data, time to the first batch and memory\n",
        f"{text['bytes'] / 1e6:,.0f} MB of text ({text['name']}) as JSON lines, and a tenth (small); sequences of "
        f"{record['sequence_length']:,} tokens, batches of 8; far position: {record['position']:,}. Fresh processes. "
        "The first batch is timed from opening the recipe on, with torch imported, whose memory is included there. "
        "`lmssl prepare` runs without torch; the memory is that of its main process.\n",
        "| what | seconds | peak memory, MB |",
        "| --- | --- | --- |",
    ]
    for name, rows in record["rows"].items():
        memory = spread([row["memory_bytes"] / 1e6 for row in rows], ",.0f")
        lines.append(f"| {name} | {spread([row['seconds'] for row in rows], '.2f')} | {memory} |")
    return "\n".join([*lines, "", where(record)])


def head(record: dict[str, Any]) -> str:
    """Seconds and memory of a step by where the head runs."""
    lines = [
        "## Masked step, where the head runs\n",
        f"BERT {record['size']}, vocabulary 30,528, {record['rows']} sequences of {record['sequence_length']} tokens, "
        f"{record['rate']:.0%} masked; bf16, compiled; forward and backward, no update. Memory: the process's peak, "
        "compiling included, less what it had before.\n",
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
        "## Masked loss by time\n",
        f"BERT, {record['model']['num_hidden_layers']} layers of {record['model']['hidden_size']}, on python_docs; "
        f"{record['num_documents']} held-out documents, 15 % masked, the same masks for all. Ours counts its whole "
        "process, compilation included; Trainer counts its steps only.\n",
        "| entrant | seconds | nats per masked token | the same, documents joined |",
        "| --- | --- | --- | --- |",
    ]
    for row in record["entrants"]:
        lines.append(f"| {row['name']} | {row['seconds']:.0f} | {row['loss']:.3f} | {row['loss_joined']:.3f} |")
    return "\n".join([*lines, "", where(record)])


TABLES = {"train": train, "startup": startup, "data": data, "start": start, "head": head, "quality": quality}


def main() -> None:
    """Write the newest record of every benchmark as a table."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted((HERE / "results").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            newest[record["benchmark"]] = record
    head = (
        "# Benchmarks\n\nMade by `python benchmarks/report.py` from `benchmarks/results/`. Medians, with minimum and "
        "maximum in brackets. Ratios are to the first baseline, round by round, because machines drift.\n"
    )
    tables = [TABLES[name.partition(",")[0]](record) for name, record in newest.items()]
    (HERE / "REPORT.md").write_text("\n".join([head, *tables]), encoding="utf-8")


if __name__ == "__main__":
    main()
