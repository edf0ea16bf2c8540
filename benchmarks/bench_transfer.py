"""What pretraining is worth: fine-tuning a pretrained export against the same architecture from random weights.

    python benchmarks/bench_transfer.py --corpora CORPORA [--objective masked|causal] [--tiny]

CORPORA holds books.jsonl.zst (author, id, text), peps.jsonl.zst (id, text) and ud_ewt/{dev,test}.conllu. A model of a
few million parameters is pretrained on the books, less all of the task's authors; then every task is learned from 50
labels, 100, ... up to all, from either start, with the same labels and as many updates. Each start has the rate that
is best for it on validation rows with 200 labels. Every run is a line of benchmarks/results/transfer.jsonl; the same
command continues where it stopped. `--work` keeps the pretrained model.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import zstandard
from record import HERE, machine, run, shown_command
from transfer_tasks import TASKS, LabelledSet, chosen_authors, read_jsonl
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from lmssl.finetune.run import Bench
from lmssl.finetune.splits import Splits, labels_of
from lmssl.finetune.start import open_start
from lmssl.finetune.task import TaskFile
from lmssl.train.precision import bf16_is_faster

RESULTS = HERE / "results" / "transfer.jsonl"
STARTS = ("random", "pretrained")
SIZES = (50, 100, 200, 500, 1000)
RATES = (1e-4, 3e-4, 1e-3)
RATE_SIZE = 200
"""Labels with which the rates are compared."""
TINY = {
    "sizes": (50,),
    "rates": (1e-3,),
    "seeds": 2,
    "pretrain_tokens": 16_384,
    "batch_tokens": 1024,
    "hidden_size": 64,
    "updates": 4,
    "epochs": 0.1,
    "num_scored": 64,
}
FAMILIES = {"masked": ("bert", 4), "causal": ("llama", 3)}
"""Kind, and how much wider its inner layers are."""
HEAD_SIZE = 64
TOKENIZERS = {"masked": "tokenizer/wordpiece-8k", "causal": "tokenizer/bpe-16k"}


def recipe(args: argparse.Namespace, text: Path) -> dict[str, Any]:
    """The pretraining of a run."""
    masked, tokens, batch = args.objective == "masked", args.pretrain_tokens, args.batch_tokens
    (kind, widening), width = FAMILIES[args.objective], args.hidden_size
    sizes = {"hidden_size": width, "intermediate_size": widening * width, "num_attention_heads": width // HEAD_SIZE}
    return {
        "name": "transfer",
        "out": str(args.work / "run"),
        "tokenizer": {"path": args.tokenizer or TOKENIZERS[args.objective]},
        "data": {
            "sequence_length": args.max_tokens,
            "mixture": [{"name": "books", "kind": "jsonl", "path": str(text)}],
            "validation": {"ratio": 0.01, "tokens": min(200_000, tokens // 4)},
            "cache": str(args.work / "cache"),
        },
        "objective": {"kind": "masked", "rate": 0.3} if masked else {"kind": "causal"},
        "model": {"kind": kind, "num_hidden_layers": 4, **sizes},
        "optim": {"kind": "adamw", "lr": 1.5e-3 if masked else 2e-3, "betas": [0.9, 0.98]},
        "schedule": {"kind": "linear", "warmup_tokens": tokens // 16 // batch * batch},
        "train": {
            "tokens": tokens // batch * batch,
            "batch_tokens": batch,
            "micro_batch_sequences": min(64, batch // args.max_tokens),
        },
        "checkpoint": {"every_steps": None if args.tiny else 500},
        "evaluate": {"every_steps": None},
    }


def pretrained(args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The export of the pretrained model, made if need be, and the recipe it was made by."""
    text = args.work / "books.jsonl.zst"
    known = recipe(args, text)
    export = args.work / "run" / "export"
    if not export.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        if not text.exists():
            left_out = chosen_authors(args.corpora)
            partial = text.with_suffix(".part")
            with zstandard.open(partial, "wt", encoding="utf-8") as file:
                for number, row in enumerate(read_jsonl(args.corpora / "books.jsonl.zst")):
                    if row["author"] not in left_out and not (args.tiny and number > 12):
                        file.write(json.dumps({"text": row["text"]}) + "\n")
            partial.rename(text)
        path = args.work / "recipe.yaml"
        path.write_text(json.dumps(known), encoding="utf-8")
        run([sys.executable, "-m", "lmssl", "train", str(path)])
        run([sys.executable, "-m", "lmssl", "export", str(args.work / "run")])
    return export, known


class Transfer:
    """Every run of the comparison, each once."""

    def __init__(self, args: argparse.Namespace, export: Path, known: dict[str, Any]) -> None:
        self.args, self.export = args, export
        told = {k: v for k, v in known.items() if k not in ("out", "name")}
        told["data"] = {k: v for k, v in told["data"].items() if k not in ("cache", "mixture")}
        settings = [args.max_tokens, args.updates, args.epochs, args.precision, args.rates, args.num_scored]
        text = json.dumps([told, settings], sort_keys=True)
        self.setup = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.about = {"objective": args.objective, "model": known["model"], "pretrain_tokens": known["train"]["tokens"]}
        lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
        rows = [json.loads(line) for line in lines]
        self.done = {self._key(row): row for row in rows if row.get("setup") == self.setup}

    def task(self, name: str) -> None:
        """All runs of one task."""
        data = TASKS[name](self.args.corpora, seed=0)
        sizes = [*(size for size in self.args.sizes if size < len(data.pool)), len(data.pool)]
        rates = {start: self._rate(name, data, start) for start in STARTS}
        for size in sizes if not self.args.tiny else sizes[:1]:
            for seed in range(1, self.args.seeds + 1):
                for start in STARTS:
                    row = self._run(name, data, start, size=size, seed=seed, lr=rates[start], purpose="score")
                    print(f"{name} {size} labels, seed {seed}, {start}: {row['score']:.4f} ({row['seconds']:.0f} s)")

    def _rate(self, name: str, data: LabelledSet, start: str) -> float:
        size = min(RATE_SIZE, len(data.pool))
        rows = [self._run(name, data, start, size=size, seed=0, lr=lr, purpose="rate") for lr in self.args.rates]
        return float(max(rows, key=lambda row: row["score"])["lr"])

    def _run(
        self, name: str, data: LabelledSet, start: str, *, size: int, seed: int, lr: float, purpose: str
    ) -> dict[str, Any]:
        """One line; rates are compared on validation rows, and scores are of test rows."""
        told = {"task": name, "start": start, "num_labels": size, "seed": seed, "lr": lr, "purpose": purpose}
        if (known := self.done.get(self._key(told))) is not None:
            return known
        # Both starts learn from the same rows.
        train = random.Random(f"{name} {size} {seed}").sample(data.pool, size)
        scored = (data.test if purpose == "score" else data.validation)[: self.args.num_scored]
        epochs = max(self.args.epochs, self.args.updates * self.args.batch_size / size)
        task = TaskFile.model_validate(
            {
                "name": name,
                "task": {"kind": data.kind},
                "data": {"train": name},
                "metric": data.metric,
                "protocol": {
                    "epochs": epochs,
                    "batch_size": self.args.batch_size,
                    "max_tokens": self.args.max_tokens,
                    "precision": self.args.precision,
                },
            }
        )
        opened = open_start(str(self.export), random_weights=start == "random")
        splits = Splits(train, scored, None, labels_of([*data.pool, *data.validation, *data.test]))
        bench = Bench(opened, task, splits, self.args.work / "trainer")
        began = time.monotonic()
        outcome, _ = bench.run(lr=lr, seed=seed)
        row = {
            "benchmark": "transfer",
            "setup": self.setup,
            "date": datetime.date.today().isoformat(),
            "command": self.args.shown,
            "machine": machine(),
            **self.about,
            **told,
            "metric": data.metric,
            "num_scored": len(scored),
            "score": outcome.scores["validation"][data.metric],
            "majority": bench.baseline()["validation"][data.metric],
            "seconds": time.monotonic() - began,
        }
        with self.args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.done[self._key(row)] = row
        return row

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("task", "start", "num_labels", "seed", "lr", "purpose"))


def arguments() -> argparse.Namespace:
    """The command line; what --tiny changes is changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--objective", choices=tuple(FAMILIES), default="masked")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--pretrain-tokens", type=int, default=40_000_000)
    parser.add_argument("--tokenizer", help="default: one of the shipped ones, by objective")
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="of an update of pretraining")
    parser.add_argument("--hidden-size", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--updates", type=int, default=300, help="updates of a run at least")
    parser.add_argument("--epochs", type=float, default=5, help="epochs of a run at least")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--num-scored", type=int, default=None, help="score so many test rows only")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 where the device multiplies it")
    parser.add_argument("--work", type=Path, default=None, help=r"default: runs/transfer-OBJECTIVE")
    parser.add_argument("--results", type=Path, help=r"default: benchmarks/results/transfer.jsonl; of --tiny, in WORK")
    parser.add_argument("--tiny", action="store_true", help="only show that it works")
    args = parser.parse_args()
    args.shown = shown_command("bench_transfer.py", sys.argv[1:], corpora="CORPORA", work="WORK", results="RESULTS")
    args.work = args.work or Path("runs") / f"transfer-{args.objective}{'-tiny' if args.tiny else ''}"
    args.precision = args.precision or (
        "bf16" if bf16_is_faster("cuda" if torch.cuda.is_available() else "cpu") else "fp32"
    )
    args.results = args.results or (args.work / RESULTS.name if args.tiny else RESULTS)
    if args.tiny:
        vars(args).update(TINY)
    missing = [name for name in ("books.jsonl.zst", "peps.jsonl.zst", "ud_ewt") if not (args.corpora / name).exists()]
    if missing:
        parser.error(f"{args.corpora} lacks {', '.join(missing)}")
    return args


def main() -> None:
    """Pretrain if need be, then every task."""
    args = arguments()
    disable_progress_bar()
    set_verbosity_error()
    export, known = pretrained(args)
    transfer = Transfer(args, export, known)
    for name in args.tasks:
        transfer.task(name)


if __name__ == "__main__":
    main()
