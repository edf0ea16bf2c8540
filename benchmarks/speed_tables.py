"""Tables of the benchmarks of training: peers, the limit, memory, time to a loss, scaling."""

from __future__ import annotations

import statistics
from typing import Any

from cells import spread, where

APART = ("train", "limit", "attention", "time_to_loss", "quality", "head")
"""Benchmarks of which a record in one precision does not replace one in the other."""


def precision(record: dict[str, Any]) -> str:
    """In which ours was measured; before records said it, all were in bf16 but those of the time to a loss."""
    dtype = record.get("dtype", record.get("rounds", [{}])[0].get("dtype"))
    if dtype is not None:
        return {"bfloat16": "bf16", "float32": "fp32"}[dtype]
    return str(record.get("precision", "fp32" if record["benchmark"] == "time_to_loss" else "bf16"))


def _baseline(record: dict[str, Any]) -> str:
    """The entrant that all others are measured by."""
    return next(str(entrant["name"]) for entrant in record["entrants"] if set(entrant["ratio_to_defaults"]) == {1.0})


def train(record: dict[str, Any]) -> str:
    """Training rates, median over rounds with the range; ratios are taken round by round."""
    rate = record.get("rate")
    masked = "" if rate is None else f", {rate:.0%} of them masked"
    batch = f"{record['rows']} sequences of {record['sequence_length']} tokens a step"
    lines = [
        f"## Training, {'causal' if rate is None else 'masked'}, CPU, {precision(record)}\n",
        f"{_shape(record)}; {batch}{masked}; {record['steps']} steps, "
        f"the first {record['warmup']} not counted; same text (python_docs), tokenizer and threads, processes in "
        f"turn. Ratio: to {_baseline(record)}.\n",
        "| entrant | tokens/s | ratio | lmssl / it | seconds to the first step's end |",
        "| --- | --- | --- | --- | --- |",
    ]
    ours = record["entrants"][0]["tokens_per_second"]
    for entrant in record["entrants"]:
        # Records of before there were peers by name do not have it.
        above = entrant.get("ours_ratio") or [a / b for a, b in zip(ours, entrant["tokens_per_second"], strict=True)]
        lines.append(
            f"| {entrant['name']} | {spread(entrant['tokens_per_second'], ',.0f')} "
            f"| {spread(entrant['ratio_to_defaults'], '.2f')} | {spread(above, '.2f')} "
            f"| {spread(entrant['first_step_seconds'], '.1f')} |"
        )
    versions = ", ".join(f"{name} {number}" for name, number in record.get("peers", {}).items())
    note = [f"Peers: {versions}."] if versions else []
    if "data_wait_ratio" in record:
        share = spread(record["data_wait_ratio"], ".2%")
        note.insert(0, f"lmssl trains in {record['precision']}, and waits for data in {share} of a step's time.")
    return "\n".join([*lines, "", *note, where(record)])


def _shape(record: dict[str, Any]) -> str:
    model = record["model"]
    size = f"{model['num_hidden_layers']} layers of {model['hidden_size']}"
    return f"{model['kind']}, {size}, vocabulary {model['vocab_size']:,}"


def limit(record: dict[str, Any]) -> str:
    """Matrix products alone against the step."""
    rate, rounds = record.get("rate"), record["rounds"]
    masked = "" if rate is None else f", {rate:.0%} of them masked"
    columns = {name: [row[name] for row in rounds] for name in rounds[0] if name != "dtype"}
    products = [a / b / 1e12 for a, b in zip(columns["flops"], columns["seconds"], strict=True)]
    lines = [
        f"## The step against its matrix products, {'causal' if rate is None else 'masked'}, CPU, "
        f"{precision(record)}\n",
        f"{_shape(record)}; {record['rows']} sequences of {record['sequence_length']} tokens a step{masked}. The "
        f"{rounds[0]['num_products']} products of a step in {rounds[0]['dtype']}, forward and backward, run alone at "
        "their shapes on operands that lie ready; share: their seconds / the seconds of a step.\n",
        "| what | seconds | share of the step |",
        "| --- | --- | --- |",
        f"| a training step | {spread(columns['step_seconds'], '.3f')} | |",
        f"| products with weights, {spread(products, '.2f')} TFLOP/s | {spread(columns['seconds'], '.3f')} "
        f"| {spread(columns['weights_share'], '.2f')} |",
        f"| products of attention | {spread(columns['attention_seconds'], '.3f')} | |",
        f"| both | | {spread(columns['share'], '.2f')} |",
    ]
    if "torch_seconds" in columns and precision(record) == "bf16":  # older records have no others
        by_torch = [(row["torch_seconds"] + row["attention_seconds"]) / row["step_seconds"] for row in rounds]
        lines.append(
            f"| both, all made by torch | {spread(columns['torch_seconds'], '.3f')} | {spread(by_torch, '.2f')} |"
        )
    fastest = spread(columns["fastest_share"], ".2f")
    lines.append(f"| both, made by torch, each product's operands laid out as is fastest | | {fastest} |")
    return "\n".join([*lines, "", where(record)])


def memory(record: dict[str, Any]) -> str:
    """Peak of a step beyond parameters, gradients and states."""
    small, large = record["vocabularies"]
    lines = [
        "## Peak memory of a step by vocabulary\n",
        f"llama, {record['layers']} layers of {record['width']}, {record['tokens']:,} tokens in sequences of "
        f"{record['sequence_length']:,}, bf16, AdamW; resident memory at its peak during two steps, less what was "
        "resident before (weights, states, libraries) and gradients.\n",
        f"| step | vocabulary {small:,}, MB | vocabulary {large:,}, MB | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for entrant in record["entrants"]:
        cells = [
            spread([row["step_bytes"] / 1e6 for row in entrant["rows"][str(size)]], ",.0f") for size in (small, large)
        ]
        lines.append(f"| {entrant['name']} | {' | '.join(cells)} | {entrant['ratio']:.2f} |")
    return "\n".join([*lines, "", where(record)])


def time_to_loss(record: dict[str, Any]) -> str:
    """What was reached when, and in which share of the peers' time."""
    lines = [
        f"## Time to a loss, causal, CPU, {precision(record)}\n",
        f"{_shape(record)}, on {record['text']}; {record['num_documents']} held-out documents, judged one by one and "
        f"joined end to end. Budget of the peers: {record['budget_seconds']:,.0f} s of their steps; ours counts whole "
        "processes.\n",
        "| entrant | seconds | M tokens | bits per byte | joined |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in record["entrants"]:
        lines.append(
            f"| {row['name']} | {row['seconds']:,.0f} | {row['num_tokens'] / 1e6:,.2f} | {row['bits_per_byte']:.4f} "
            f"| {row['joined_bits_per_byte']:.4f} |"
        )
    lines += [
        "",
        "| against | judged | to reach | asked share of its time | share |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in record["criteria"]:
        share = "not reached" if row["ratio"] is None else f"{row['ratio']:.3f}"
        judged = "joined" if row["judged"].startswith("joined") else "one by one"
        lines.append(f"| {row['against']} | {judged} | {row['target']:.4f} | {row['asked_ratio']:.3f} | {share} |")
    return "\n".join([*lines, "", where(record)])


def scaling(record: dict[str, Any]) -> str:
    """Weak scaling of two processes, and what they exchange."""
    lines = [
        "## Two processes on CPU\n",
        f"{_shape(record)}; each process has one thread and {record['rows']} sequences of "
        f"{record['sequence_length']} tokens a step. Efficiency: seconds of a step of one process / of two.\n",
        "| processes | seconds a step | efficiency |",
        "| --- | --- | --- |",
    ]
    for way, seconds in record["step_seconds"].items():
        found = record["efficiency"].get(way)
        lines.append(f"| {way} | {spread(seconds, '.3f')} | {spread(found, '.2f') if found else ''} |")
    lines += [
        "",
        "What a rank sends in a step, by the sizes of its collectives, against the least its division of labour "
        "allows: 2 (n - 1) / n of the gradients' float32 bytes where every rank has all weights, 3 (n - 1) / n where "
        "weights are gathered for forward and backward.\n",
        "| backend | MB | least, MB | ratio | calls |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in record["volumes"]:
        if "error" in row:
            lines.append(f"| {row['backend']} | failed | | | |")
            continue
        calls = ", ".join(f"{count} {name}" for name, count in row["calls"].items())
        sizes = f"{row['total_bytes'] / 1e6:,.2f} | {row['least_bytes'] / 1e6:,.2f}"
        lines.append(f"| {row['backend']} | {sizes} | {row['ratio']:.3f} | {calls} |")
    return "\n".join([*lines, "", where(record)])


def attention(record: dict[str, Any]) -> str:
    """Milliseconds of a layer's attention by length and way."""
    names = list(record["rows"][0]["seconds"])
    lines = [
        f"## Document attention by length, CPU, {precision(record)}\n",
        f"One layer, {record['heads']} heads of {record['head']}, {record['dtype']}, {record['tokens']:,} tokens, "
        "forward and backward, milliseconds; documents of log-normal lengths. Steps in this type go by "
        f"{'tiles, without kernels by ' * ('tiles' in names)}the loop from {record['loop_from_tokens']:,} tokens on.\n",
        f"| attention | mean document | sequence | {' | '.join(names)} | fastest |",
        f"| --- | --- | --- | {'--- | ' * len(names)}--- |",
    ]
    for row in record["rows"]:
        cells = [spread([second * 1e3 for second in row["seconds"][name]], ".1f") for name in names]
        fastest = min(names, key=lambda name: statistics.median(row["seconds"][name]))
        lines.append(
            f"| {'causal' if row['causal'] else 'both ways'} | {row['mean']:,.0f} | {row['length']:,} "
            f"| {' | '.join(cells)} | {fastest} |"
        )
    return "\n".join([*lines, "", where(record)])
