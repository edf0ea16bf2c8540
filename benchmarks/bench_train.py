"""Training tokens per second against transformers' Trainer, side by side in one run.

    python benchmarks/bench_train.py [--objective causal|masked] [--repeats 3] [--steps 14] [--tiny]

Every entrant is a process of its own with the same model config, text, tokenizer, batch, threads and number of
steps; rounds run A B C A B C. The first `--warmup` steps (compilation among them) are left out of every entrant's
rate alike, and reported as seconds to the first step. Results are appended to benchmarks/results/train.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import BertConfig, LlamaConfig

from lmssl.data.corpus import read_texts
from lmssl.recipe.data import PythonDocsCorpus
from lmssl.shipped import find

HERE = Path(__file__).parent
ENTRANTS = {
    "lmssl": [],
    "Trainer, defaults": [],
    "Trainer, bf16": ["--bf16"],
    "Trainer, bf16 + compile": ["--bf16", "--compile"],
}


def causal_model(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A llama of 17 million parameters, as a config file for the peers and a model section for us."""
    width = 64 if args.tiny else 384
    section: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": width * 8 // 3 // 64 * 64 or 64,
        "num_hidden_layers": 2 if args.tiny else 6,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "tie_word_embeddings": True,
        "vocab_size": 16384,
    }
    LlamaConfig(**section, max_position_embeddings=args.length).save_pretrained(folder)
    return {"kind": "llama", **section}


def masked_model(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """BERT mini or small (Turc et al. 2019) without dropout, with a vocabulary of 30,528."""
    width = {"tiny": 128, "mini": 256, "small": 512}["tiny" if args.tiny else args.size]
    section: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2 if args.tiny else 4,
        "num_attention_heads": width // 64,
        "vocab_size": 30528,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    BertConfig(**section, max_position_embeddings=args.length).save_pretrained(folder)
    return {"kind": "bert", **section}


MODELS = {"causal": causal_model, "masked": masked_model}
TOKENIZERS = {"causal": "tokenizer/bpe-16k", "masked": "tokenizer/wordpiece-30k"}


def prepare(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The shared inputs: text, tokenizer, model config; returns the model section of our recipe."""
    tokenizer, model = find(Path(TOKENIZERS[args.objective])), folder / "model"
    section = MODELS[args.objective](model, args)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(tokenizer / name, model / name)
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for text in read_texts([PythonDocsCorpus(name="python_docs", kind="python_docs")]):
            file.write(json.dumps({"text": text}) + "\n")
    return section


def ours(folder: Path, section: dict[str, Any], args: argparse.Namespace, number: int) -> dict[str, Any]:
    """One lmssl run; step times come from its metrics."""
    tokens = args.rows * args.length
    rates = {"rate": args.rate, "evaluation_rate": args.rate} if args.objective == "masked" else {}
    recipe = {
        "name": "bench",
        "out": str(folder / f"run-{number}"),
        "tokenizer": {"path": str(folder / "model")},
        "data": {
            "sequence_length": args.length,
            "mixture": [{"name": "text", "kind": "jsonl", "path": str(folder / "text.jsonl")}],
            "validation": None,
            "cache": str(folder / f"cache-{number}"),
        },
        "objective": {"kind": args.objective, **rates},
        "model": section,
        "optim": {"kind": "adamw", "lr": 5e-5},
        "schedule": {"kind": "linear"},
        "train": {
            "tokens": tokens * args.steps,
            "batch_tokens": tokens,
            "micro_batch_sequences": args.rows,
            "log_every_steps": 1,
            "compile": "model",
        },
        "checkpoint": {"every_steps": None},
    }
    path = folder / f"recipe-{number}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    run([sys.executable, "-m", "lmssl", "prepare", str(path)])  # the peers tokenize before their first step, too
    run([sys.executable, "-m", "lmssl", "train", str(path)])
    lines = (folder / f"run-{number}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {"step_seconds": [row["time"]["seconds"] for row in rows], "loss": rows[-1]["loss"]}


def peer(folder: Path, flags: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """One Trainer run."""
    command = [sys.executable, str(HERE / "peers/trainer.py"), args.objective]
    command += [str(folder / "model"), str(folder / "text.jsonl"), "--rate", str(args.rate)]
    command += ["--sequence-length", str(args.length), "--rows", str(args.rows), "--steps", str(args.steps), *flags]
    row: dict[str, Any] = json.loads(run(command).strip().splitlines()[-1])
    return row


def run(command: list[str]) -> str:
    """Run a command to its end and return what it printed; the compiler's cache starts empty each time."""
    with tempfile.TemporaryDirectory() as compiled:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": compiled, "PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown")
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets", "tokenizers")}
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def main() -> None:
    """Run all entrants in rounds and append the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=list(MODELS), default="causal")
    parser.add_argument("--size", choices=["mini", "small"], default="mini", help="of BERT")
    parser.add_argument("--rate", type=float, default=0.15, help="share of tokens masked, run_mlm's default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--skip", action="append", default=[], choices=list(ENTRANTS)[2:], help="leave a peer out")
    parser.add_argument("--tiny", action="store_true", help="a model too small to mean anything, to try the script")
    parser.add_argument("--out", type=Path, default=HERE / "results/train.jsonl")
    args = parser.parse_args()
    entrants = {name: flags for name, flags in ENTRANTS.items() if name not in args.skip}
    rates: dict[str, list[float]] = {name: [] for name in entrants}
    first: dict[str, list[float]] = {name: [] for name in entrants}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        section = prepare(folder, args)
        for repeat in range(args.repeats):
            for name, flags in entrants.items():
                row = ours(folder, section, args, repeat) if name == "lmssl" else peer(folder, flags, args)
                seconds = row["step_seconds"]
                rate = args.rows * args.length / statistics.median(seconds[args.warmup :])
                rates[name].append(rate)
                first[name].append(seconds[0])
                print(
                    f"round {repeat + 1}  {name:30} {rate:9,.0f} tokens/s  first step {seconds[0]:5.1f} s", flush=True
                )
    baseline = rates["Trainer, defaults"]
    record = {
        "benchmark": "train" if args.objective == "causal" else f"train, masked, bert-{args.size}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python benchmarks/bench_train.py", *(shlex.quote(word) for word in sys.argv[1:])]),
        "machine": machine(),
        "model": section,
        "sequence_length": args.length,
        "rows": args.rows,
        "steps": args.steps,
        "warmup": args.warmup,
        "rate": args.rate if args.objective == "masked" else None,
        "entrants": [
            {
                "name": name,
                "tokens_per_second": rates[name],
                "first_step_seconds": first[name],
                "ratio_to_defaults": [a / b for a, b in zip(rates[name], baseline, strict=True)],
            }
            for name in entrants
        ],
    }
    args.out.parent.mkdir(exist_ok=True)
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
