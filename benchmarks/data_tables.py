"""Tables of REPORT.md about the data plane."""

from __future__ import annotations

from typing import Any

from cells import spread, where

_SHORT = (
    " Documents of 1 KiB are about as long as each other: what a sequence has left over none of them fills, and no "
    "longer one is there to be cut for it, hence their padding.\n"
)


def data(record: dict[str, Any]) -> str:
    """Corpus to packed sequences on disk; ratios are taken round by round."""
    text, count = record["text"], record["processes"]
    lines = [
        f"## Data, {record['tokenizer']}, {text['name'].partition('.')[0]}\n",
        f"Corpus -> sequences of {record['sequence_length']:,} tokens on disk: {text['name']}, "
        f"{text['bytes'] / 1e6:,.0f} MB of text (sha256 {text['sha256']}); {count} processes or threads; imports "
        "are not counted, starting workers and loading the tokenizer are. Reading: sequences at random places from a "
        "warm page cache, one process."
        + (_SHORT if any("1 KiB" in entrant["name"] for entrant in record["entrants"]) else "\n"),
        "| entrant | M tokens/s, per core | MB/s, per core | ratio | of raw engine | reading, M tokens/s | padding |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    raw = next((e["tokens_per_second"] for e in record["entrants"] if e["name"].startswith("raw engine")), None)
    for entrant in record["entrants"]:
        tokens = [rate / 1e6 / count for rate in entrant["tokens_per_second"]]
        megabytes = [rate / 1e6 / count for rate in entrant["bytes_per_second"]]
        ratio = spread(entrant["ratio_to_baseline"], ".1f") if entrant["ratio_to_baseline"] else ""
        pairs = zip(entrant["tokens_per_second"], raw or [], strict=False)  # peers may have run in some rounds alone
        share = spread([ours / theirs for ours, theirs in pairs], ".2f") if raw else ""
        reads = entrant["read_tokens_per_second"]
        reading = spread([rate / 1e6 for rate in reads], ".1f") if reads else ""
        padding = "" if entrant["padding_ratio"] is None else f"{entrant['padding_ratio']:.3%}"
        lines.append(
            f"| {entrant['name']} | {spread(tokens, '.2f')} | {spread(megabytes, '.1f')} | {ratio} | {share} "
            f"| {reading} | {padding} |"
        )
    return "\n".join([*lines, *_padding(record.get("padding", [])), "", where(record)])


def _padding(rows: list[dict[str, Any]]) -> list[str]:
    """Padding of best-fit packing by the length of sequences; no document that fits into one is cut."""
    if not rows:
        return []
    lines = [
        "\n| sequence length | windows | sequences in smallest and largest | padding | in those of 1,000 and more |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        sizes = row["num_sequences"]
        lines.append(
            f"| {row['sequence_length']:,} | {len(sizes)} | {min(sizes):,} and {max(sizes):,} "
            f"| {row['padding_ratio']:.3%} | {row['padding_ratio_large']:.3%} |"
        )
    return lines


def start(record: dict[str, Any]) -> str:
    """Seconds to the first batch and peak memory."""
    text, rows = record["text"], record["rows"]
    lines = [
        "## Data, time to the first batch and memory\n",
        f"{text['bytes'] / 1e6:,.0f} MB of text ({text['name']}) as JSON lines, and a tenth (small); sequences of "
        f"{record['sequence_length']:,} tokens, batches of 8; far position: {record['position']:,}. Fresh processes. "
        "The first batch is timed from opening the recipe on, with torch imported, whose memory is included there. "
        "`lmssl prepare` runs without torch; "
        + (
            "memory is the sum of the peaks of a command's processes, pages that they share counted in each.\n"
            if record.get("memory") == "tree"
            else "the memory is that of its main process.\n"
        ),
        "| what | seconds | peak memory, MB |",
        "| --- | --- | --- |",
    ]
    for name, found in rows.items():
        memory = spread([row["memory_bytes"] / 1e6 for row in found], ",.0f")
        lines.append(f"| {name} | {spread([row['seconds'] for row in found], '.3f')} | {memory} |")
    ratios = [("first batch, far position", "first batch, position 0"), ("prepare, large", "prepare, small")]
    for name, base in ratios:
        pairs = list(zip(rows[name], rows[base], strict=True))
        seconds, memory = ([a[key] / b[key] for a, b in pairs] for key in ("seconds", "memory_bytes"))
        lines.append(
            f"| {name} / {base.removeprefix('first batch, ')} | {spread(seconds, '.3f')} | {spread(memory, '.3f')} |"
        )
    return "\n".join([*lines, "", where(record)])
