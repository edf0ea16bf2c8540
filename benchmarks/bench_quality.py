"""Masked loss on held-out text: ours in some time against run_mlm's way in three times as much.

    python benchmarks/bench_quality.py [--steps 400] [--size mini] [--tiny]

We train BERT for so many steps on the text every Python ships, less every 20th document; the time counts from the
start of our process, compilation included, to its end. Then transformers' Trainer trains the same model on the same
text for at least three times as long, counting its steps only, once with the learning rate that run_mlm.py has by
default and once with ours: where its steps went quicker than a trial said, it trains anew with more of them. All are
exported and loaded by the stock class, and judged on the same masks (15 %, 80/10/10) of
the held-out documents: one by one between [CLS] and [SEP], and joined end to end, as run_mlm.py reads them.
Results are appended to benchmarks/results/quality.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from entrants import prepare
from environment import peers_python
from record import HERE, last_json, place, run, without_compiling, write
from transformers import AutoModelForMaskedLM, AutoTokenizer

from lmssl.recipe.load import load_recipe

HELD_OUT_EVERY = 20
RATE = 0.15
TIMES = 3
"""Of our seconds, that the peer has at least."""
MARGIN = 1.1
"""Steps asked of the peer / those that the seconds of a trial give: training anew costs more than a tenth."""


def split(folder: Path) -> list[str]:
    """Take every 20th document out of the text; returns those."""
    path = folder / "text.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(x for i, x in enumerate(lines) if i % HELD_OUT_EVERY), encoding="utf-8")
    return [json.loads(line)["text"] for line in lines[::HELD_OUT_EVERY]]


def ours(folder: Path, section: dict[str, Any], args: argparse.Namespace) -> tuple[Path, float]:
    """Train and export by lmssl; returns the export, and seconds from the start of training to its end."""
    tokens = args.rows * args.length
    recipe = {
        "name": "quality",
        "out": str(folder / "run"),
        "tokenizer": {"path": str(folder / "model")},
        "data": {
            "sequence_length": args.length,
            "mixture": [{"name": "text", "kind": "jsonl", "path": str(folder / "text.jsonl")}],
            "validation": None,
            "cache": str(folder / "cache"),
        },
        "objective": {"kind": "masked", "rate": args.rate},
        "model": section,
        "optim": {"kind": "adamw", "lr": args.lr, "weight_decay": 0.01, "betas": [0.9, 0.98], "eps": 1e-6},
        "schedule": {"kind": "linear", "warmup_tokens": tokens * args.steps // 16},
        "train": {
            "tokens": tokens * args.steps,
            "batch_tokens": tokens,
            "micro_batch_sequences": args.rows,
            "compile": "model",
        },
        "checkpoint": {"every_steps": None},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    started = time.perf_counter()
    run([sys.executable, "-m", "lmssl", "train", str(path)])
    seconds = time.perf_counter() - started
    run([sys.executable, "-m", "lmssl", "export", str(folder / "run"), "--out", str(folder / "ours")])
    return folder / "ours", seconds


def theirs(folder: Path, args: argparse.Namespace, seconds: float, lr: float) -> tuple[Path, float]:
    """Train by Trainer for at least so many seconds of steps; returns the export and the seconds it took."""
    out = folder / f"theirs-{lr}"
    command = [str(peers_python("train")), str(HERE / "peers/trainer.py"), "masked", str(folder / "model")]
    command += [str(folder / "text.jsonl"), "--sequence-length", str(args.length), "--rows", str(args.rows)]
    command += ["--rate", str(RATE), "--lr", str(lr)]
    trial = last_json(run([*command, "--steps", "6"]))
    step_seconds = statistics.median(trial["step_seconds"][2:])
    while True:
        steps = max(6, math.ceil(MARGIN * seconds / step_seconds))
        done = last_json(run([*command, "--steps", str(steps), "--out", str(out)]))
        spent = sum(done["step_seconds"])
        if spent >= seconds:
            return out, spent
        step_seconds = spent / steps


def rows_of(folder: Path, documents: list[str], length: int, *, joined: bool) -> list[tuple[list[int], list[int]]]:
    """(what the model reads, labels) of the held-out text, masks fixed."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    random, found = np.random.default_rng(0), []
    encoded = [tokenizer(text, truncation=not joined, max_length=None if joined else length) for text in documents]
    ids = [row["input_ids"] for row in encoded]
    if joined:
        flat = [token for row in ids for token in row]
        ids = [flat[i : i + length] for i in range(0, len(flat) // length * length, length)]
    for row in ids:
        read, labels = np.array(row), np.full(len(row), -100)
        chosen = ~np.isin(read, tokenizer.all_special_ids) & (random.random(len(row)) < RATE)
        labels[chosen] = read[chosen]
        kind = random.random(len(row))
        read[chosen & (kind < 0.8)] = tokenizer.mask_token_id
        swapped = chosen & (kind >= 0.8) & (kind < 0.9)
        read[swapped] = random.integers(len(tokenizer.all_special_ids), len(tokenizer), swapped.sum())
        found.append((read.tolist(), labels.tolist()))
    return found


@torch.no_grad()
def judge(folder: Path, rows: list[tuple[list[int], list[int]]]) -> float:
    """Nats per masked token."""
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    nats, count = 0.0, 0
    for read, labels in rows:
        targets = torch.tensor([labels])
        number = int((targets != -100).sum())
        if number:
            nats += float(model(input_ids=torch.tensor([read]), labels=targets).loss) * number
            count += number
    return nats / count


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of ours")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="of ours, that of recipes/pretrain/bert-mini.yaml")
    parser.add_argument("--rate", type=float, default=0.3, help="share of tokens masked in our training")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--peers", type=int, default=2, choices=[1, 2], help="1: only run_mlm's own learning rate")
    parser.add_argument("--size", choices=["mini", "small"], default="mini", help="of BERT")
    parser.add_argument("--tiny", action="store_true", help="a model too small to mean anything, to try the script")
    parser.add_argument("--out", type=Path, help="default: the results; with --tiny the record is printed")
    args = parser.parse_args(words)
    args.objective = "masked"
    if args.tiny:
        without_compiling()
        args.steps, args.length, args.rows, args.peers = 4, 64, 4, 1
    return args


def main() -> None:
    """Train all, judge all, append the record."""
    args = parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        section = prepare(folder, args)
        documents = split(folder)
        trained = {"lmssl": ours(folder, section, args)}
        precision = load_recipe(folder / "run/recipe.yaml").recipe.train.precision
        seconds = trained["lmssl"][1]
        for lr in (5e-5, args.lr)[: args.peers]:
            name = "Trainer, defaults" if lr == 5e-5 else f"Trainer, learning rate {lr:g}"
            trained[name] = theirs(folder, args, TIMES * seconds, lr)
        rows = {j: rows_of(folder / "model", documents, args.length, joined=j) for j in (False, True)}
        entrants = [
            {
                "name": name,
                "seconds": spent,
                "seconds_ratio": spent / seconds,
                "loss": judge(path, rows[False]),
                "loss_joined": judge(path, rows[True]),
            }
            for name, (path, spent) in trained.items()
        ]
    print(json.dumps(entrants, indent=1))
    write(
        place(args, "quality"),
        "quality",
        "bench_quality.py",
        model=section,
        precision=precision,
        steps=args.steps,
        num_documents=len(documents),
        entrants=entrants,
    )


if __name__ == "__main__":
    main()
