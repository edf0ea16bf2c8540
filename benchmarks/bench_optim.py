"""Steps that Muon needs for the loss that a tuned AdamW ends with: same model, text, batches and schedule.

    python benchmarks/bench_optim.py [--size 10m] [--steps 500] [--corpus "books/*.txt"] [--seeds 1]

Every run is warmup, stable part, and a linear decay over its last fifth, and is judged by its loss on held-out text.
First both optimisers train for `--steps` with each rate of their grids; Muon's embeddings, norms and head have the best
rate of AdamW. Then Muon's best run gives shorter ones: decays of a fifth branch off its checkpoints (`lmssl train
--from-checkpoint --decay`), so that its final loss is known at 40 %, 50 %, ... 100 % of the steps; where that curve
meets AdamW's final loss is read off between two of them, on a scale of log steps. With more seeds, the best rates are
trained again with other initial weights and another order of text. A best rate at the edge of its grid is said.

Runs lie in `--work` and continue where they were; what is done is a line of benchmarks/results/optim.jsonl, which is
not made again. The last line is the summary.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import HERE, machine, shown_command

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 2},
    "2m": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 2},
    "10m": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4},
    "25m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6},
}
"""Llamas; 10m and 25m are those of recipes/pretrain."""
DECAY_RATIO = 0.2
PARTS = 25
"""Muon's checkpoints divide its run so often that a stable part of 4/5 of every tenth ends with one."""
TENTHS = range(4, 10)
"""Lengths of the shorter runs of Muon."""


WARMUP_STEPS, VALIDATION_TOKENS, PRECISION = 25, 200_000, "auto"
"""Where the command does not say."""


class Bench:
    """The runs, each made once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.settings = {
            "size": args.size,
            "steps": args.steps,
            "batch_tokens": args.batch_tokens,
            "sequence_length": args.sequence_length,
            "corpus": None if args.corpus is None else Path(args.corpus).name,
            "tokenizer": args.tokenizer,
            "weight_decay": args.weight_decay,
            "warmup_steps": args.warmup_steps,
            "validation_tokens": args.validation_tokens,
            "precision": args.precision,
        }
        lines = args.out.read_text(encoding="utf-8").splitlines() if args.out.exists() else []
        self.done = [completed(json.loads(line)) for line in lines]

    def train(self, optim: dict[str, Any], *, seed: int) -> dict[str, Any]:
        """One run over all steps; its record."""
        rates = "-".join(f"{key}-{value:g}" for key, value in optim.items() if key != "kind")
        name = f"{optim['kind']}-{rates}-seed-{seed}"
        return self._once({"optim": optim, "seed": seed, "tenths": 10}, lambda: self._trained(name, optim, seed))

    def branch(self, whole: dict[str, Any], tenths: int) -> dict[str, Any]:
        """A run of so many tenths of the steps, from the stable part of a whole one."""
        key = {"optim": whole["optim"], "seed": whole["seed"], "tenths": tenths}
        return self._once(key, lambda: self._branched(self.args.work / whole["run"], tenths))

    def _once(self, key: dict[str, Any], make: Any) -> dict[str, Any]:
        wanted = {"benchmark": "optim", "kind": "run", **self.settings, **key}
        for record in self.done:
            if all(record.get(name) == value for name, value in wanted.items()):
                return dict(record)
        record = wanted | make()
        self.write(record)
        print(
            f"{record['optim']} seed {record['seed']}, {record['tenths']} tenths: loss {record['loss']:.4f}", flush=True
        )
        return record

    def write(self, record: dict[str, Any]) -> None:
        """Append a line."""
        record |= {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), "machine": machine()}
        record["command"] = shown_command("bench_optim.py", sys.argv[1:], corpus="CORPUS", work="WORK", out="RESULTS")
        self.done.append(record)
        with self.args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _trained(self, name: str, optim: dict[str, Any], seed: int) -> dict[str, Any]:
        args, run = self.args, self.args.work / name
        every = args.steps * 2 // PARTS
        mixture: list[dict[str, Any]] = [{"name": "python", "kind": "python_docs"}]
        if args.corpus is not None:
            kind = "jsonl" if ".jsonl" in args.corpus else "text"
            mixture = [{"name": "text", "kind": kind, "path": args.corpus}]
        recipe = {
            "name": name,
            "seed": seed,
            "out": str(run),
            "tokenizer": {"path": args.tokenizer},
            "data": {
                "sequence_length": args.sequence_length,
                "mixture": mixture,
                "validation": {"ratio": 0.02, "tokens": args.validation_tokens},
                "cache": str(args.work / "cache"),
            },
            "objective": {"kind": "causal"},
            "model": {"kind": "llama", **SIZES[args.size]},
            "optim": {"weight_decay": args.weight_decay, **optim},
            "schedule": {"kind": "wsd", "warmup_tokens": args.warmup_tokens, "decay_ratio": DECAY_RATIO},
            "train": {
                "tokens": args.steps * args.batch_tokens,
                "batch_tokens": args.batch_tokens,
                "micro_batch_sequences": min(args.micro_batch_sequences, args.batch_tokens // args.sequence_length),
                "compile": args.compile,
                "precision": args.precision,
            },
            "checkpoint": {"every_steps": every, "keep_last": PARTS if optim["kind"] == "muon" else 1},
        }
        path = args.work / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(recipe), encoding="utf-8")
        lmssl("train", str(path))
        return judged(run)

    def _branched(self, run: Path, tenths: int) -> dict[str, Any]:
        stable, every = tenths * self.args.steps * 2 // PARTS, self.args.steps * 2 // PARTS
        assert stable % every == 0
        out = run.with_name(f"{run.name}-tenths-{tenths}")
        decay = (tenths * self.args.steps // 10 - stable) * self.args.batch_tokens
        options = ["--from-checkpoint", f"{run}@{stable}", "--decay", "--decay-tokens", str(decay)]
        lmssl("train", *options, f"out={out}", "checkpoint.keep_last=1")
        return judged(out)


def lmssl(*arguments: str) -> None:
    """Run a verb to its end; its lines are shown only if it fails."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "lmssl", *arguments], capture_output=True, text=True, env=env, check=False
    )
    if done.returncode:
        raise SystemExit(f"lmssl {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")


def completed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the settings that lines did not hold at first; their commands do.

    >>> completed({"command": "bench_optim.py --validation-tokens 9", "precision": "fp32"})
    {'warmup_steps': 25, 'validation_tokens': 9, 'precision': 'fp32', 'command': 'bench_optim.py --validation-tokens 9'}
    """
    words = shlex.split(record["command"])
    given = dict(itertools.pairwise(words))
    said = {
        "warmup_steps": int(given.get("--warmup-steps", WARMUP_STEPS)),
        "validation_tokens": int(given.get("--validation-tokens", VALIDATION_TOKENS)),
        "precision": given.get("--precision", PRECISION),
    }
    return said | record


def judged(run: Path) -> dict[str, Any]:
    """What a run ended with."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [row for row in rows if row["kind"] == "evaluate"][-1]
    trained = [row for row in rows if row["kind"] == "train"]
    seconds = sum(row["time"]["seconds"] for row in trained)
    loss = math.inf if last["loss"] is None else last["loss"]  # a rate that is too high
    return {"run": run.name, "loss": loss, "num_steps": last["step"], "training_seconds": seconds}


def ratio(adamw: float, curve: list[tuple[int, float]], steps: int) -> float | None:
    """Muon's steps / AdamW's for the loss that AdamW ends with, between two points of Muon's curve.

    None: not reached; 0: reached by the shortest run already.

    >>> round(ratio(3.0, [(40, 3.4), (50, 3.1), (60, 2.9), (100, 2.7)], 100), 3)
    0.548
    """
    curve = sorted(curve)
    if curve[0][1] <= adamw:
        return 0.0
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= adamw < high:
            share = (high - adamw) / (high - low)
            return math.exp(math.log(before) + share * (math.log(after) - math.log(before))) / steps
    return None


def best(records: list[dict[str, Any]], rates: list[float]) -> dict[str, Any]:
    """The record of the lowest loss; says where it is at the edge of its grid."""
    found = min(records, key=lambda record: record["loss"])
    rate = found["optim"]["lr"]
    if len(rates) > 1 and rate in (min(rates), max(rates)):
        print(f"the best rate of {found['optim']['kind']}, {rate:g}, is at the edge of its grid: widen it", flush=True)
    return found


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES], default="10m")
    parser.add_argument("--steps", type=int, default=500, help=f"of AdamW; a multiple of {2 * PARTS}")
    parser.add_argument("--corpus", help=".txt or .jsonl files by a pattern; without one, Python's documentation")
    parser.add_argument("--tokenizer", default="tokenizer/bpe-16k")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--micro-batch-sequences", type=int, default=16)
    parser.add_argument("--validation-tokens", type=int, default=VALIDATION_TOKENS)
    parser.add_argument("--warmup-steps", type=int, default=WARMUP_STEPS)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--compile", choices=["auto", "off"], default="auto")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default=PRECISION)
    parser.add_argument("--adamw", type=float, nargs="+", default=[1.5e-3, 3e-3, 6e-3, 1.2e-2], help="rates")
    parser.add_argument("--muon", type=float, nargs="+", default=[3e-3, 6e-3, 1.2e-2, 2.4e-2], help="rates of matrices")
    parser.add_argument("--seeds", type=int, default=1, help="of the best rates")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-optim"))
    parser.add_argument("--out", type=Path, default=HERE / "results/optim.jsonl")
    args = parser.parse_args(words)
    args.warmup_tokens = args.warmup_steps * args.batch_tokens
    if args.steps % (2 * PARTS):
        parser.error(f"--steps must be a multiple of {2 * PARTS}")
    return args


def main() -> None:
    """Tune both, branch, compare, append the summary."""
    args = parse()
    bench = Bench(args)
    adamw = best([bench.train({"kind": "adamw", "lr": lr}, seed=1) for lr in args.adamw], args.adamw)
    others = adamw["optim"]["lr"]
    muon = best([bench.train({"kind": "muon", "lr": lr, "adamw_lr": others}, seed=1) for lr in args.muon], args.muon)
    rows = []
    for seed in range(1, args.seeds + 1):
        theirs, whole = bench.train(adamw["optim"], seed=seed), bench.train(muon["optim"], seed=seed)
        curve = [(run["num_steps"], run["loss"]) for run in (whole, *(bench.branch(whole, t) for t in TENTHS))]
        seconds = [run["training_seconds"] / run["num_steps"] for run in (theirs, whole)]
        rows.append(
            {
                "seed": seed,
                "adamw_loss": theirs["loss"],
                "muon_loss": whole["loss"],
                "muon_curve": sorted(curve),
                "steps_ratio": ratio(theirs["loss"], curve, args.steps),
                "step_seconds_ratio": seconds[1] / seconds[0],
            }
        )
    found = [row["steps_ratio"] for row in rows if row["steps_ratio"] is not None]
    summary = {
        "benchmark": "optim",
        "kind": "summary",
        **bench.settings,
        "adamw": adamw["optim"],
        "muon": muon["optim"],
        "grids": {"adamw": args.adamw, "muon": args.muon},
    }
    summary |= {"seeds": rows, "steps_ratio": statistics.mean(found) if len(found) == len(rows) else None}
    bench.write(summary)
    print(json.dumps(summary["seeds"], indent=1))
    print(f"steps of Muon / steps of AdamW for the same loss: {summary['steps_ratio']}")


if __name__ == "__main__":
    main()
