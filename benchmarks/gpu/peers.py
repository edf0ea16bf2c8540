"""Training tokens/s of a 124 M llama against transformers' Trainer and a nanoGPT loop on one card, in turns A B A B.

    python benchmarks/gpu/peers.py --out FOLDER --scratch FOLDER [--device cpu --tiny] [--rounds 2]

Same shape, text, tokenizer and tokens a step; each entrant is a process of its own. Trainer runs at its defaults and
at its best (bf16, compiled, fused AdamW, loader processes; with Liger's kernels where they are installed). Ours and the
nanoGPT loop have one setting each that is default and best. The first steps are left out of all rates alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setting import MODELS, TINY, drive, finish, parse, recipe, text_file, write
from transformers import LlamaConfig

from lmssl.shipped import find

PEERS = Path(__file__).parent.parent / "peers"
OURS = "lmssl"
STEPS, WARMUP = 24, 10


@dataclass(frozen=True)
class Entrant:
    """A script of `benchmarks/peers` with its options."""

    script: str
    flags: tuple[str, ...] = ()
    steps: int = STEPS


def entrants(args: argparse.Namespace) -> dict[str, Entrant | None]:
    """By name, ours first."""
    best = ("--bf16", "--compile", "--loaders", "4")
    few = STEPS // 2  # float32 is slow, and steady from its first steps on
    found: dict[str, Entrant | None] = {OURS: None}
    found["Trainer, best: bf16, compiled, fused AdamW, sdpa"] = Entrant("trainer.py", ("causal", *best))
    if (further("liger_kernel") / "liger_kernel").is_dir() and args.device == "cuda":
        found["Trainer, best with Liger"] = Entrant("trainer.py", ("causal", *best, "--liger"))
    found["nanoGPT loop: bf16, compiled, fused AdamW"] = Entrant("nanogpt.py", ("--device", args.device))
    found["Trainer, defaults: fp32, eager"] = Entrant("trainer.py", ("causal",), few)
    return found


def further(package: str) -> Path:
    """Where gpu.sh put a package that only one entrant is to find."""
    return Path(os.environ.get("LMSSL_GPU_FURTHER", "further")) / package


def shared_folder(args: argparse.Namespace, length: int) -> Path:
    """Config and tokenizer as the peers read them."""
    folder: Path = args.scratch / "model"
    section = {key: value for key, value in MODELS["124M"].items() if key != "kind"}
    section |= TINY | {"vocab_size": 32768} if args.tiny else {}
    section["num_key_value_heads"] = section["num_attention_heads"]
    LlamaConfig(**section, max_position_embeddings=length).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(find(Path("tokenizer/bpe-32k")) / name, folder / name)
    return folder


def theirs(args: argparse.Namespace, entrant: Entrant, folder: Path, shape: tuple[int, int, int]) -> dict[str, Any]:
    """One run of a peer; what it prints last."""
    length, rows, steps = shape
    positional = [flag for flag in entrant.flags if flag == "causal"]
    flags = [flag for flag in entrant.flags if flag != "causal"]
    if args.tiny:
        flags = [flag for flag in flags if flag not in ("--compile", "--loaders", "4")]
    command = [sys.executable, str(PEERS / entrant.script), *positional, str(folder), str(text_file(args))]
    command += ["--sequence-length", str(length), "--rows", str(rows), "--steps", str(steps), *flags]
    cache = str(args.scratch / "inductor-peers")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
    if "--liger" in flags:
        env["PYTHONPATH"] = os.pathsep.join([str(further("liger_kernel")), env.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {done.stderr[-1500:]}")
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def ours(args: argparse.Namespace, shape: tuple[int, int, int]) -> dict[str, Any]:
    """One run of ours, in a process of its own."""
    folders = ["--out", str(args.out), "--scratch", str(args.scratch)]
    command = [sys.executable, __file__, "--device", args.device, *folders, "--ours", ",".join(map(str, shape))]
    command += ["--tiny"] if args.tiny else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {done.stderr[-1500:]}")
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def inside(args: argparse.Namespace) -> None:
    """What `ours` starts."""
    length, rows, steps = map(int, args.ours.split(","))
    loaders = {"workers": 1}
    asked = recipe(args, "peers", "124M", length=length, micro_sequences=rows, steps=steps, data=loaders)
    found = drive(asked, args.device, steps=steps)
    row = {"step_seconds": found.step_seconds, "loss": found.losses[-1], "memory_bytes": found.memory_bytes}
    print(json.dumps(row | {"documents_per_sequence": found.num_documents}))


def main() -> None:
    """Rounds of all entrants; a row at once."""
    args = parse(__doc__, rounds=2, ours="")
    if args.ours:
        inside(args)
        return
    length, rows, warmup = (128, 4, 1) if args.tiny else (2048, 16, WARMUP)
    folder, rates = shared_folder(args, length), dict[tuple[int, str], float]()
    for number in range(1 if args.tiny else args.rounds):
        for name, entrant in entrants(args).items():
            if number and time.monotonic() + 25 > args.deadline:
                print(f"peers: no time for {name} in round {number + 1}")
                continue
            steps = 3 if args.tiny else STEPS if entrant is None else entrant.steps
            shape = length, rows, steps
            about = {"round": number + 1, "name": name, "sequence_length": length, "rows": rows}
            began = time.monotonic()
            try:
                found = ours(args, shape) if entrant is None else theirs(args, entrant, folder, shape)
            except Exception as error:
                write(args, "peers", **about, error=f"{type(error).__name__}: {error}"[:2000])
                continue
            left_out = min(warmup, steps // 2)
            rate = length * rows / statistics.median(found["step_seconds"][left_out:])
            rates[number, name] = rate
            ratio = rates[number, OURS] / rate if (number, OURS) in rates else None
            about |= {"tokens_per_second": rate, "ours_ratio": ratio, "warmup": left_out}
            write(args, "peers", **about, seconds=time.monotonic() - began, **found)
    finish(args)


if __name__ == "__main__":
    main()
