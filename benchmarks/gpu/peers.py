"""Training tokens/s of a 124 M llama against transformers' Trainer and a nanoGPT loop on one card, in turns A B A B.

    python benchmarks/gpu/peers.py --out FOLDER --scratch FOLDER [--device cpu --tiny] [--rounds 2]

Same shape, text, tokenizer and tokens a step; each entrant is a process of its own. Trainer runs at its defaults and
at its best (bf16, compiled, fused AdamW, loader processes; with Liger's kernels where they are installed). Ours and the
nanoGPT loop have one setting each that is default and best. The first steps are left out of all rates alike. Trainer's
other settings run once, in the last round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rows import Row, finish, output_of, run_rows
from setting import MODELS, TINY, drive, parse, recipe, text_file
from transformers import LlamaConfig

from lmssl.shipped import find

PEERS = Path(__file__).parent.parent / "peers"
OURS = "lmssl"
STEPS, WARMUP = 14, 6
OUR_SECONDS, AGAIN_SECONDS = 30.0, 25.0
"""Of a run, by guess: of ours that compiles layer by layer, and of any that finds what was compiled before."""
TEXT_BYTES = 8_000_000
"""Of the text that peers read: more than their steps need, for they prepare all that they are given."""


@dataclass(frozen=True)
class Entrant:
    """A script of `benchmarks/peers` with its options."""

    script: str
    flags: tuple[str, ...] = ()
    steps: int = STEPS
    seconds: float = 45.0
    """Of the first run, by guess: these compile the whole model."""


def entrants(args: argparse.Namespace) -> tuple[dict[str, Entrant | None], dict[str, Entrant | None]]:
    """By name: those of every round, ours first, and those of the last."""
    best = ("--bf16", "--compile", "--best", "--loaders", "4")
    few = STEPS // 2  # float32 is slow, and steady from its first steps on
    always: dict[str, Entrant | None] = {OURS: None}
    always["Trainer, best: bf16, compiled, fused AdamW, sdpa"] = Entrant("trainer.py", ("causal", *best))
    always["nanoGPT loop: bf16, compiled, fused AdamW"] = Entrant("nanogpt.py", ("--device", args.device))
    once: dict[str, Entrant | None] = {}
    if (further("liger_kernel") / "liger_kernel").is_dir() and args.device == "cuda":
        once["Trainer, best with Liger"] = Entrant("trainer.py", ("causal", *best, "--liger"))
    once["Trainer, defaults: fp32, eager"] = Entrant("trainer.py", ("causal",), few, 25.0)
    return always, once


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


def some_text(args: argparse.Namespace) -> Path:
    """The beginning of the text, in whole lines."""
    path: Path = args.scratch / "text-peers.jsonl"
    if not path.exists():
        with text_file(args).open("rb") as file:
            path.write_bytes(b"".join(file.readlines(TEXT_BYTES)))
    return path


def theirs(args: argparse.Namespace, entrant: Entrant, folder: Path, shape: tuple[int, int, int]) -> dict[str, Any]:
    """One run of a peer; what it prints last."""
    length, rows, steps = shape
    positional = [flag for flag in entrant.flags if flag == "causal"]
    flags = [flag for flag in entrant.flags if flag != "causal"]
    if args.tiny:
        flags = [flag for flag in flags if flag not in ("--compile", "--loaders", "4")]
    command = [sys.executable, str(PEERS / entrant.script), *positional, str(folder), str(some_text(args))]
    command += ["--sequence-length", str(length), "--rows", str(rows), "--steps", str(steps), *flags]
    cache = str(args.scratch / "inductor-peers")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
    if "--liger" in flags:
        env["PYTHONPATH"] = os.pathsep.join([str(further("liger_kernel")), env.get("PYTHONPATH", "")])
    row: dict[str, Any] = json.loads(output_of(command, env).strip().splitlines()[-1])
    return row


def ours(args: argparse.Namespace, shape: tuple[int, int, int]) -> dict[str, Any]:
    """One run of ours, in a process of its own."""
    folders = ["--out", str(args.out), "--scratch", str(args.scratch)]
    command = [sys.executable, __file__, "--device", args.device, *folders, "--ours", ",".join(map(str, shape))]
    command += ["--tiny"] if args.tiny else []
    row: dict[str, Any] = json.loads(output_of(command).strip().splitlines()[-1])
    return row


def inside(args: argparse.Namespace) -> None:
    """What `ours` starts."""
    length, rows, steps = map(int, args.ours.split(","))
    loaders = {"workers": 1}
    asked = recipe(args, "peers", "124M", length=length, micro_sequences=rows, steps=steps, data=loaders)
    found = drive(asked, args.device, steps=steps)
    row = {"step_seconds": found.step_seconds, "loss": found.losses[-1], "memory_bytes": found.memory_bytes}
    print(json.dumps(row | {"documents_per_sequence": found.num_documents}))


def planned(args: argparse.Namespace) -> list[Row]:
    """Rounds of all entrants, in turn."""
    length, rows, warmup = (128, 4, 1) if args.tiny else (2048, 16, WARMUP)
    folder, rates = shared_folder(args, length), dict[tuple[int, str], float]()

    def find(number: int, name: str, entrant: Entrant | None) -> dict[str, Any]:
        began = time.monotonic()
        steps = 3 if args.tiny else STEPS if entrant is None else entrant.steps
        shape = length, rows, steps
        found = ours(args, shape) if entrant is None else theirs(args, entrant, folder, shape)
        left_out = min(warmup, steps // 2)
        rate = length * rows / statistics.median(found["step_seconds"][left_out:])
        rates[number, name] = rate
        ratio = rates[number, OURS] / rate if (number, OURS) in rates else None
        about = {"tokens_per_second": rate, "ours_ratio": ratio, "warmup": left_out}
        return {**about, "seconds": time.monotonic() - began, **found}

    always, once = entrants(args)
    last, made = 1 if args.tiny else args.rounds, list[Row]()
    for number in range(1, last + 1):
        for name, entrant in {**always, **(once if number == last else {})}.items():
            about = {"round": number, "name": name, "sequence_length": length, "rows": rows}
            first = OUR_SECONDS if entrant is None else entrant.seconds
            seconds = AGAIN_SECONDS if number > 1 and name in always else first
            made.append(Row(about, partial(find, number, name, entrant), seconds))
    return made


def main() -> None:
    """Rounds of all entrants; a row at once."""
    args = parse(__doc__, rounds=2, ours="")
    if args.ours:
        inside(args)
        return
    run_rows(args, "peers", planned(args))
    finish(args)


if __name__ == "__main__":
    main()
