"""Tables of what gpu.sh found, for report.py: the newest rows of each stage."""

from __future__ import annotations

import statistics
from typing import Any

Rows = list[dict[str, Any]]


def newest(rows: Rows) -> Rows:
    """Of each row, by its name, the one that was written last; tries of the script are left out.

    One that was left out for lack of time, or stopped, does not replace what another call has found.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if not row["tiny"]:
            what = row.get("name") or row.get("what") or row.get("model")
            key = what, row.get("round"), row.get("compile"), row.get("causal"), *_shape(row)
            if key not in found or not ("left_out" in row or row.get("error", "").startswith("stopped")):
                found[key] = row
    return list(found.values())


def _shape(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("head_width"), row.get("mean_document_tokens"), row.get("vocabulary")


def tables(by_stage: dict[str, Rows]) -> list[str]:
    """One text a stage that has rows."""
    found = []
    for stage, table in (("correctness", correctness), ("mfu", mfu), ("peers", peers), ("memory", memory)):
        rows = newest(by_stage.get(stage, []))
        if rows:
            found.append("\n".join([*table(rows), "", _where(rows[-1])]))
    rows = newest(by_stage.get("kernels", []))
    if rows:
        found.append("\n".join([*kernels(rows), "", _where(rows[-1])]))
    return found


def _where(row: dict[str, Any]) -> str:
    machine = row["machine"]
    versions = ", ".join(f"{k} {machine[k]}" for k in ("torch", "triton", "transformers", "accelerate") if k in machine)
    return f"{row['date']}; {machine['device']}; Python {machine['python']}, {versions}.\nReproduce: `make bench-gpu`\n"


def _failed(row: dict[str, Any]) -> str | None:
    return row.get("left_out") or row.get("error")


def correctness(rows: Rows) -> list[str]:
    """What was checked before anything was timed."""
    lines = ["## GPU, correctness\n", "| what | result |", "| --- | --- |"]
    for row in rows:
        said = _failed(row) or row.get("summary") or ""
        if "num_leaks" in row:
            worst = max(row["differences"].values())
            said = f"{row['num_leaks']} leaks among {row['documents']} documents; off by {worst:.4f} from float64"
        elif "loss_difference" in row:
            said = f"loss off by {row['loss_difference']:.1e}, gradients by {row['gradient_difference']:.4f} from fp32"
        causal = {True: ", causal", False: ", both ways"}.get(row.get("causal"), "")
        verdict = "not tried" if "left_out" in row else "right" if row.get("good") else "WRONG"
        lines.append(f"| {row['what']}{causal} | {verdict}: {_cell(said)} |")
    return lines


def mfu(rows: Rows) -> list[str]:
    """Utilisation of one card."""
    lines = [
        "## GPU, utilisation\n",
        f"{rows[0]['formula']} ({(rows[0]['peak_flops'] or 0) / 1e12:,.1f} TFLOP/s). Packed with document attention; "
        f"rates are those of the median step, with the slowest and the quickest. {rows[0]['documents_formula']}.\n",
        "| model, tokens of a sequence, settings | tokens/s | MFU | MFU by documents | micro-batch | GB "
        "| documents a sequence |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if _failed(row):
            lines.append(f"| {row['name']} | {_cell(_failed(row))} | | | | | |")
            continue
        low, high = row["spread"]
        whole, needed = ("" if row[name] is None else f"{row[name]:.1%}" for name in ("mfu", "mfu_documents"))
        size = f"{row['micro_batch_sequences']} | {row['memory_bytes'] / 1e9:.0f} | {row['documents_per_sequence']:.1f}"
        rate = f"{row['tokens_per_second']:,.0f} ({low:,.0f}-{high:,.0f})"
        lines.append(f"| {row['name']} | {rate} | {whole} | {needed} | {size} |")
    return lines


def peers(rows: Rows) -> list[str]:
    """Rates of all entrants; the ratio is taken round by round."""
    first = rows[0]
    lines = [
        "## GPU, beside others\n",
        f"Llama of 124 M, {first['rows']} sequences of {first['sequence_length']} tokens a step; processes in turn.\n",
        "| entrant | tokens/s | ours / theirs | GB |",
        "| --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        good = [row for row in mine if not _failed(row)]
        if not good:
            lines.append(f"| {name} | {_cell(_failed(mine[0]))} | | |")
            continue
        rates = [row["tokens_per_second"] for row in good]
        ratios = [row["ours_ratio"] for row in good if row["ours_ratio"] is not None]
        memory_bytes = max(row.get("memory_bytes", 0) for row in good)
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""
        rate = f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})"
        lines.append(f"| {name} | {rate} | {ratio} | {memory_bytes / 1e9:.0f} |")
    return lines


def memory(rows: Rows) -> list[str]:
    """Peak of a step by the size of the vocabulary."""
    lines = [
        "## GPU, memory by vocabulary\n",
        "The most that a step of 8k tokens holds beyond weights, optimiser states and the gradients that exist then.\n",
        "| model, compile | 1k, GB | 128k, GB | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for model, compile_ in dict.fromkeys((row["model"], row["compile"]) for row in rows):
        pair = sorted(
            (row for row in rows if (row["model"], row["compile"]) == (model, compile_)),
            key=lambda row: row["vocabulary"],
        )
        held = [row["beyond_bytes"] for row in pair if not _failed(row)]
        cells = [_cell(_failed(row)) if _failed(row) else f"{row['beyond_bytes'] / 1e9:.2f}" for row in pair]
        ratio = f"{held[1] / held[0]:.2f}" if len(held) == 2 and held[0] else ""
        lines.append(f"| {model}, {compile_} | {' | '.join((*cells, '')[:2])} | {ratio} |")
    return lines


def kernels(rows: Rows) -> list[str]:
    """The kernels of a step, then attention's ways."""
    lines = ["## GPU, where a step's time goes\n"]
    for row in rows:
        if "top" in row:
            lines.append(f"{row['what']}: no kernel runs in {row['idle_ratio']:.1%} of the time.\n")
            lines += ["| kernel | share | calls in two steps |", "| --- | --- | --- |"]
            lines += [f"| `{_cell(k['name'])[:90]}` | {k['ratio']:.1%} | {k['calls']} |" for k in row["top"][:12]]
            lines.append("")
    alone = [row for row in rows if "tflops" in row]
    if alone:
        lines += ["Alone, in bf16, TFLOP/s:\n", "| what | rates |", "| --- | --- |"]
        for row in alone:
            rates = ", ".join(f"{name} {rate:.0f}" for name, rate in row["tflops"].items())
            lines.append(f"| {row['what']} | {rates} |")
        lines.append("")
    lines += [
        "Attention of one layer, 16 sequences of 2,048 tokens, causal; TFLOP/s count pairs within documents only.\n",
        "| way | head width | tokens of a document | forward, ms | with backward, ms | TFLOP/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "useful_tflops" in row:
            times = f"{row['forward_seconds'] * 1e3:.2f} | {row['seconds'] * 1e3:.2f} | {row['useful_tflops']:.0f}"
            lines.append(f"| {row['what']} | {row['head_width']} | {row['mean_document_tokens']} | {times} |")
        elif _failed(row):
            shape = f"{row.get('head_width', '')} | {row.get('mean_document_tokens', '')}"
            lines.append(f"| {row['what']} | {shape} | {_cell(_failed(row))} | | |")
    return lines


def _cell(text: Any) -> str:
    return str(text).replace("|", "/").replace("\n", " ")[:200]
