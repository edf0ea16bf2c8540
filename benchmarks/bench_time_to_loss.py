"""Seconds to the held-out bits per byte that run_clm reaches in a budget, on the same text and machine.

    python benchmarks/bench_time_to_loss.py [--text FILE.jsonl] [--budget-seconds 1800] [--rates 3e-4 1e-3] [--tiny]

transformers' Trainer, as run_clm uses it, trains a llama for the budget: at its defaults, and compiled in the faster
precision at the best of some learning rates, each trained for the whole budget. Its seconds are its steps' at their
median rate: neither tokenizing nor compiling counts. Our recipe (Muon, warmup, stable, decay; `train.max_hours` ends
it) trains the same model for shares of the seconds that the defaults took, from the smallest on; its seconds are those
of the whole process, from the first import to the last checkpoint, tokenizing and compiling included. The same held-out
documents judge all, by `lmssl eval` on transformers folders: one by one, and joined end to end as run_clm reads text.
Asked: an eighth of the defaults' seconds for their loss, half of the tuned ones' for theirs. Results are appended to
benchmarks/results/time_to_loss.jsonl; with --further, runs of ours are added to the last record's, if machine and
settings are the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from entrants import BASELINE, PEERS, Peer, prepare, recipe_of, theirs, train_rows
from record import machine, place, run, shown_command, without_compiling, write

from lmssl.train.precision import bf16_is_faster

OURS = "lmssl"
HELD_OUT_EVERY = 20
COMPILE_FROM_SECONDS = 240
"""A run of ours that is shorter is not compiled: that alone takes up to a minute and a half."""
ASKED = {"defaults": 1 / 8, "tuned": 1 / 2}
"""Share of the budget in which ours is to reach the same."""


@dataclass(frozen=True)
class Trained:
    """What somebody made in some time."""

    name: str
    seconds: float
    num_tokens: int
    bits_per_byte: float
    joined_bits_per_byte: float


def split(folder: Path, text: Path | None, judge_bytes: int) -> int:
    """Take every 20th document out of the text; some of them, apart and joined, are what judges; returns how many."""
    path = folder / "text.jsonl"
    lines = (text or path).read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(x for i, x in enumerate(lines) if i % HELD_OUT_EVERY), encoding="utf-8")
    held = lines[::HELD_OUT_EVERY]
    held = held[:: -(-sum(map(len, held)) // judge_bytes)]
    (folder / "held-out.jsonl").write_text("".join(held), encoding="utf-8")
    joined = "\n\n".join(json.loads(line)["text"] for line in held)
    (folder / "joined.jsonl").write_text(json.dumps({"text": joined}) + "\n", encoding="utf-8")
    return len(held)


def judge(folder: Path, model: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Bits per byte of the held-out documents, one by one and joined."""
    evaluations = [
        {
            "name": name,
            "kind": "loss",
            "prefix": "none",
            "corpus": {"name": name, "kind": "jsonl", "path": str(folder / f"{name}.jsonl")},
            "context_tokens": args.length,
        }
        for name in ("held-out", "joined")
    ]
    suite, out = folder / "suite.yaml", folder / "judged.jsonl"
    suite.write_text(json.dumps({"evaluations": evaluations}), encoding="utf-8")
    out.unlink(missing_ok=True)
    run([sys.executable, "-m", "lmssl", "eval", str(model), "--suite", str(suite), "--out", str(out)])
    rows = {row["name"]: row for row in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    return rows["held-out"]["metrics"]["bits_per_byte"], rows["joined"]["metrics"]["bits_per_byte"]


def peer(folder: Path, args: argparse.Namespace, name: str, kind: Peer, lr: float) -> Trained:
    """Trainer for about the budget of steps."""
    out, rate = folder / "theirs", ("--lr", str(lr))
    args.steps = args.trial_steps
    trial = statistics.median(theirs(folder, kind, args, *rate)["step_seconds"][args.trial_steps // 2 :])
    args.steps = max(2, round(args.budget_seconds / trial))
    done = theirs(folder, kind, args, *rate, "--out", str(out))
    seconds = statistics.median(done["step_seconds"]) * args.steps
    alone, joined = judge(folder, out, args)
    shutil.rmtree(out)
    return Trained(name, seconds, args.steps * args.rows * args.length, alone, joined)


def ours(folder: Path, section: dict[str, Any], args: argparse.Namespace, seconds: float) -> Trained:
    """A recipe of ours for about so many seconds of the whole process."""
    name, batch = f"ours-{seconds:.0f}", args.our_rows * args.length
    args.steps = 10**6 // args.rows  # more than there is time for
    recipe = recipe_of(folder, section, args, name)
    recipe["optim"] = {"kind": "muon", "lr": args.lr, "adamw_lr": args.adamw_lr, "weight_decay": 0.1}
    recipe["schedule"] = {"kind": "wsd", "warmup_tokens": batch * args.warmup_steps, "decay_ratio": args.decay_ratio}
    spent = max(1.0, seconds - args.reserve_seconds)
    recipe["train"] |= {
        "batch_tokens": batch,
        "micro_batch_sequences": args.our_rows,
        "max_hours": spent / 3600,
        "compile": "model" if seconds >= COMPILE_FROM_SECONDS else "off",
        "log_every_steps": 10,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    started = time.perf_counter()
    run([sys.executable, "-m", "lmssl", "train", str(path)])
    took = time.perf_counter() - started
    trained, out = folder / f"run-{name}", folder / f"export-{name}"
    run([sys.executable, "-m", "lmssl", "export", str(trained), "--out", str(out)])
    alone, joined = judge(folder, out, args)
    tokens = train_rows(trained)[-1]["tokens"]
    for done in (trained, out, folder / f"cache-{name}"):
        shutil.rmtree(done)
    return Trained(OURS, took, tokens, alone, joined)


def reached(found: list[Trained], target: Trained, field: str) -> float | None:
    """Seconds of the quickest of ours that is as good; None: none is."""
    as_good = [one.seconds for one in found if getattr(one, field) <= getattr(target, field)]
    return min(as_good, default=None)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help='JSON lines with "text"; default: the text every Python ships')
    parser.add_argument("--budget-seconds", type=float, default=1800.0)
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[1 / 16, 1 / 10, 1 / 8, 1 / 4, 1 / 2],
        help="of the seconds of the defaults",
    )
    parser.add_argument("--further", action="store_true", help="add shares of ours to the last record of this machine")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="of the tuned Trainer")
    parser.add_argument("--lr", type=float, default=6e-3, help="ours, of matrices")
    parser.add_argument("--adamw-lr", type=float, default=3e-3, help="ours, of the rest")
    parser.add_argument("--warmup-steps", type=int, default=10, help="ours")
    parser.add_argument("--decay-ratio", type=float, default=0.4, help="ours")
    parser.add_argument("--our-rows", type=int, default=4, help="sequences of a step of ours")
    parser.add_argument("--reserve-seconds", type=float, default=8.0, help="of ours, for starting and saving")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--judge-bytes", type=int, default=10**6, help="of held-out text, about")
    parser.add_argument("--trial-steps", type=int, default=6)
    parser.add_argument("--tiny", action="store_true", help="a model too small to mean anything, to try the script")
    parser.add_argument("--out", type=Path, help="default: the results; with --tiny the record is printed")
    args = parser.parse_args()
    args.objective = "causal"
    if args.tiny:
        without_compiling()
        args.budget_seconds, args.length, args.rows, args.judge_bytes, args.trial_steps = 4.0, 64, 4, 20_000, 4
        args.shares, args.rates, args.reserve_seconds = [0.5], [1e-3], 0.0
    return args


def peers(folder: Path, args: argparse.Namespace) -> list[Trained]:
    """Trainer at its defaults, then at its best with each learning rate."""
    bf16 = ("--bf16",) if bf16_is_faster("cpu") else ()  # its best on this processor
    way = f"Trainer, {'bf16' if bf16 else 'fp32'}, compiled"
    tuned = Peer("trainer.py", (*bf16, "--compile", "--best"), masked=True)
    found = [peer(folder, args, BASELINE, PEERS[BASELINE], 5e-5)]
    say(found[0])
    for lr in args.rates:
        found.append(peer(folder, args, f"{way}, learning rate {lr:g}", tuned, lr))
        say(found[-1])
    return found


def earlier(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The last record, which runs of ours are added to.

    Raises:
        SystemExit: there is none, or it is of another machine or of other settings.
    """
    path = place(args, "time_to_loss")
    lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
    last: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    wanted = settings | {"machine": machine()}
    if differing := [name for name, value in wanted.items() if last.get(name) != value]:
        raise SystemExit(f"--further: the last record has other {', '.join(differing)}; run without it")
    return last


def main() -> None:
    """Train all, judge all, append the record."""
    args = parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        section = prepare(folder, args)
        settings = {
            "precision": "bf16" if bf16_is_faster("cpu") else "fp32",
            "text": "python_docs" if args.text is None else args.text.name,
            "model": section,
            "sequence_length": args.length,
            "rows": args.rows,
            "num_documents": split(folder, args.text, args.judge_bytes),
        }
        known = earlier(args, settings) if args.further else {"budget_seconds": args.budget_seconds}
        rows = [Trained(**row) for row in known.get("entrants", ())]
        others = [row for row in rows if row.name != OURS] or peers(folder, args)
        found = [row for row in rows if row.name == OURS]
        for share in sorted(args.shares):
            found.append(ours(folder, section, args, share * others[0].seconds))
            say(found[-1])
    tried = others[1:]
    best = min(tried, key=lambda one: one.bits_per_byte)
    if best in (tried[0], tried[-1]) and len(tried) > 1:
        print(f"{best.name} is at the edge of its grid: widen it", flush=True)
    found.sort(key=lambda one: one.seconds)
    criteria = [
        {
            "against": name,
            "judged": field,
            "target": getattr(target, field),
            "asked_ratio": ASKED[name],
            "seconds": (seconds := reached(found, target, field)),
            "ratio": None if seconds is None else seconds / target.seconds,
        }
        for name, target in (("defaults", others[0]), ("tuned", best))
        for field in ("bits_per_byte", "joined_bits_per_byte")
    ]
    settings |= {"budget_seconds": known["budget_seconds"]}
    settings |= {"entrants": [asdict(one) for one in (*others, *found)], "criteria": criteria}
    if args.further:
        settings["command"] = f"{known['command']}` and `{shown_command('bench_time_to_loss.py', sys.argv[1:])}"
    write(place(args, "time_to_loss"), "time_to_loss", "bench_time_to_loss.py", **settings)


def say(one: Trained) -> None:
    """A line on the terminal."""
    print(f"{one.name:50} {one.seconds:8.0f} s {one.num_tokens:12,} tokens  {one.bits_per_byte:.4f}", flush=True)


if __name__ == "__main__":
    main()
