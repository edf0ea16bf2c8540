"""Training tokens per second against what people use, side by side in one run.

    python benchmarks/bench_train.py [--objective causal|masked] [--repeats 3] [--steps 14] [--tiny]

Every entrant is a process of its own with the same model shape, text, tokenizer, batch, threads and number of steps;
rounds run A B C A B C. The first `--warmup` steps (compilation among them) are left out of every entrant's rate alike,
and reported as seconds to the end of the first step. Each peer runs as it is documented and at its best; peers live in
an environment of their own, which is made on the first run (.venvs/peers-train). The nanoGPT loop trains nanoGPT's own
block with as many weights, all others train the same llama; masked models are trained by lmssl and Trainer only.
Results are appended to benchmarks/results/train.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from entrants import BASELINE, MODELS, OURS, PEERS, UNCOMPILED, ours, peers_of, prepare, theirs
from environment import peers_python
from record import place, versions_in, without_compiling, write


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=list(MODELS), default="causal")
    parser.add_argument("--size", choices=["mini", "small"], default="mini", help="of BERT")
    parser.add_argument("--rate", type=float, default=0.15, help="share of tokens masked, run_mlm's default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--skip", action="append", default=[], choices=list(PEERS)[1:], help="leave a peer out")
    parser.add_argument("--tiny", action="store_true", help="a model too small to mean anything, to try the script")
    parser.add_argument("--out", type=Path, help="default: the results; with --tiny the record is printed")
    args = parser.parse_args()
    if args.tiny:
        without_compiling()
        args.repeats, args.steps, args.warmup, args.length, args.rows = 1, 4, 2, 64, 4
    return args


def main() -> None:
    """Run all entrants in rounds and append the results."""
    args = parse()
    peers = {name: peer for name, peer in peers_of(args.objective).items() if name not in args.skip}
    python = peers_python("train")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in (OURS, UNCOMPILED, *peers)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        section = prepare(folder, args)
        for repeat in range(args.repeats):
            for name in rows:
                if name in peers:
                    found = theirs(folder, peers[name], args)
                else:
                    found = ours(folder, section, args, repeat, compiled=name == OURS)
                seconds = found["step_seconds"]
                found["rate"] = args.rows * args.length / statistics.median(seconds[args.warmup :])
                rows[name].append(found)
                said = f"{found['rate']:9,.0f} tokens/s  first step {seconds[0]:5.1f} s"
                print(f"round {repeat + 1}  {name:45} {said}", flush=True)
    rates = {name: [row["rate"] for row in found] for name, found in rows.items()}

    def ratios(above: str, below: str) -> list[float]:
        return [a / b for a, b in zip(rates[above], rates[below], strict=True)]

    write(
        place(args, "train"),
        "train" if args.objective == "causal" else f"train, masked, bert-{args.size}",
        "bench_train.py",
        peers=versions_in(python, "torch", "transformers", "accelerate", "litgpt", "lightning"),
        model=section,
        sequence_length=args.length,
        rows=args.rows,
        steps=args.steps,
        warmup=args.warmup,
        rate=args.rate if args.objective == "masked" else None,
        precision=rows[OURS][0]["precision"],
        data_wait_ratio=[row["data_wait_ratio"] for row in rows[OURS]],
        entrants=[
            {
                "name": name,
                "threads": rows[name][0].get("threads"),
                "tokens_per_second": rates[name],
                "first_step_seconds": [row["step_seconds"][0] for row in rows[name]],
                "ratio_to_defaults": ratios(name, BASELINE),
                "ours_ratio": ratios(OURS, name),
            }
            for name in rows
        ],
    )


if __name__ == "__main__":
    main()
