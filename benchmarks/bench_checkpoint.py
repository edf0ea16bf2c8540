"""What a checkpoint costs: how long training stands still for it, and how long a run takes to continue from one.

    python benchmarks/bench_checkpoint.py [--repeats 5] [--threads 2] [--tiny]

A llama of 50 million parameters with AdamW. Pause: synchronous and asynchronous saves of the same state in turn, on the
disk of --folder; the ratio is taken pair by pair. Resume: seconds from the start of `lmssl train`
(interpreter, imports and validation included) to the end of its first step, which is one short sequence, from a
checkpoint of step 3 and from one that says step 1,000,000. Results are appended to benchmarks/results/checkpoint.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LENGTH, FAR_STEP = 128, 1_000_000


def write_recipe(folder: Path, args: argparse.Namespace, steps: int) -> Path:
    """One sequence a step on python_docs; every step is saved and logged."""
    width = 64 if args.tiny else 512
    recipe = {
        "name": "bench",
        "out": str(folder / "run"),
        "tokenizer": {"path": "tokenizer/bpe-16k"},
        "data": {
            "sequence_length": LENGTH,
            "mixture": [{"name": "text", "kind": "python_docs"}],
            "validation": None,
            "cache": str(folder / "cache"),
        },
        "objective": {"kind": "causal"},
        "model": {
            "kind": "llama",
            "hidden_size": width,
            "intermediate_size": width * 11 // 4,
            "num_hidden_layers": 13,
            "num_attention_heads": width // 64,
            "tie_word_embeddings": True,
        },
        "optim": {"kind": "adamw", "lr": 1e-4},
        "schedule": {"kind": "constant"},  # whose runs may be extended
        "train": {
            "tokens": LENGTH * steps,
            "batch_tokens": LENGTH,
            "micro_batch_sequences": 1,
            "log_every_steps": 1,
            "compile": "off",
            "precision": "fp32",  # the run folder holds what auto came to
        },
        "checkpoint": {"every_steps": None, "keep_last": 9},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def train(recipe: Path, args: argparse.Namespace) -> float:
    """Run `lmssl train` to its end; returns the seconds from its start to the last line of its metrics."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    began = time.time()
    command = [sys.executable, "-m", "lmssl", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return (recipe.parent / "run/metrics.jsonl").stat().st_mtime - began


def far_checkpoint(recipe: Path) -> None:
    """Beside the newest checkpoint, one with the same tensors that stands at a far step."""
    from lmssl import checkpoint
    from lmssl.data.stream import SequenceStream
    from lmssl.recipe.load import load_recipe, resolved_yaml
    from lmssl.tokenizer.load import load_tokenizer

    loaded = load_recipe(recipe).recipe
    found = checkpoint.find_step(Path(loaded.out_path), None)
    state = json.loads(found.text("state.json"))
    state |= {"step": FAR_STEP, "cursor": FAR_STEP, "tokens_seen": FAR_STEP * LENGTH}
    tokenizer = load_tokenizer(Path(loaded.tokenizer.path))
    stream = SequenceStream.open(loaded.data, tokenizer, loaded.data_seed, Path(loaded.data.cache))
    texts = {"config.json": found.text("config.json"), "recipe.yaml": resolved_yaml(loaded)}
    texts |= {"state.json": json.dumps(state), "ledger.jsonl": stream.ledger_at(FAR_STEP + 8).text()}
    saver = checkpoint.Saver(
        Path(loaded.out_path), keep=checkpoint.Keep(last=9), clock=time.monotonic, report=lambda _: None
    )
    saver.save(FAR_STEP, tensors={group: found.tensors(group) for group in found.groups}, texts=texts)


def resumes(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds to the end of the first step after a resume, by step; near and far in turn."""
    from lmssl import checkpoint

    train(write_recipe(folder, args, steps=3), args)
    far_checkpoint(write_recipe(folder, args, steps=3))
    run, found = folder / "run", dict[str, list[float]]()
    far = checkpoint.step_folders(run)[-1]
    metrics = (run / "metrics.jsonl").read_text(encoding="utf-8")
    for _ in range(args.repeats + 1):
        for name, step in (("near", 3), ("far", FAR_STEP)):
            (run / "metrics.jsonl").write_text(metrics, encoding="utf-8")
            if name == "near":
                far.rename(folder / "aside")
            recipe = write_recipe(folder, args, steps=step + 1)
            (run / "recipe.yaml").write_text(recipe.read_text(encoding="utf-8"), encoding="utf-8")
            found.setdefault(name, []).append(train(recipe, args))
            checkpoint.discard_after(run, step)
            if name == "near":
                (folder / "aside").rename(far)
    return {name: seconds[1:] for name, seconds in found.items()}  # the first fills the system's file cache


def pauses(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pauses and whole seconds of synchronous and asynchronous saves, in turn."""
    import torch
    from accelerate import Accelerator

    from lmssl import checkpoint
    from lmssl.model.build import build_config, build_recipe_model
    from lmssl.objective.build import build_objective
    from lmssl.objective.module import LossModule
    from lmssl.optim.groups import build_optimizer
    from lmssl.recipe.load import load_recipe
    from lmssl.tokenizer.load import load_tokenizer
    from lmssl.train.backend import Replicated
    from lmssl.train.launch import keep_memory

    keep_memory()  # as every run does: copies then reuse the memory of earlier ones
    torch.set_num_threads(args.threads)
    recipe = load_recipe(write_recipe(folder, args, steps=3)).recipe
    tokenizer = load_tokenizer(Path(recipe.tokenizer.path))
    config = build_config(
        recipe.model, vocab_size=16384, sequence_length=LENGTH, tokenizer=tokenizer, objective="causal"
    )
    objective = build_objective(recipe, tokenizer, num_positions=recipe.batches.num_positions)
    core = LossModule(build_recipe_model(recipe, config), objective, bf16=False)
    backend = Replicated(core, Accelerator(cpu=True), lambda: build_optimizer(core.model, recipe.optim))
    for parameter in core.parameters():
        parameter.grad = torch.ones_like(parameter)
    backend.update(torch.ones(()))
    rows: dict[str, list[dict[str, float]]] = {"synchronous": [], "asynchronous": []}
    savers = {
        name: checkpoint.Saver(
            folder / name,
            keep=checkpoint.Keep(last=2),
            clock=time.monotonic,
            report=lambda _: None,
            asynchronous=name == "asynchronous",
        )
        for name in rows
    }
    for step in range(args.repeats + 1):
        for name, saver in savers.items():
            saver.save(step, tensors=backend.owned_tensors, texts={"state.json": "{}"})
            saver.wait()
            (saved,) = saver.finished()
            rows[name].append({"pause_seconds": saved.pause_seconds, "total_seconds": saved.total_seconds})
            num_bytes = saved.num_bytes
    for saver in savers.values():
        saver.close()
    return {
        "num_parameters": sum(p.numel() for p in core.parameters()),
        "num_bytes": num_bytes,
        "saves": {name: found[1:] for name, found in rows.items()},
    }


def main() -> None:
    """Measure and append one record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="Where to write, on a disk; default: the temporary folder.")
    parser.add_argument("--tiny", action="store_true", help="Small model, to try the benchmark itself.")
    parser.add_argument("--out", type=Path, default=HERE / "results/checkpoint.jsonl")
    args = parser.parse_args()
    from record import machine

    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch).resolve()
        record = {
            "benchmark": "checkpoint",
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/bench_checkpoint.py", *sys.argv[1:]]),
            "machine": machine(),
            "threads": args.threads,
            **pauses(args, folder),
            "far_step": FAR_STEP,
            "resume_seconds": resumes(args, folder),
        }
    pairs = zip(record["saves"]["asynchronous"], record["saves"]["synchronous"], strict=True)
    record["pause_ratio"] = [a["pause_seconds"] / b["pause_seconds"] for a, b in pairs]
    args.out.parent.mkdir(exist_ok=True)
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    for name, rows in record["saves"].items():
        for key in ("pause_seconds", "total_seconds"):
            print(f"{name:13} {key:14} {statistics.median(row[key] for row in rows):7.2f}")
    print(f"ratio of pauses {statistics.median(record['pause_ratio']):.3f}")
    for name, seconds in record["resume_seconds"].items():
        print(f"resume, {name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f})")


if __name__ == "__main__":
    main()
