"""Model FLOPs utilisation of stock models, packed with document attention, in bf16; and tokens/s of ModernBERT-base.

    python benchmarks/gpu/mfu.py --out FOLDER --scratch FOLDER [--device cpu --tiny] [--only TEXT]

Each row is lmssl's own session: loader, compiled layers, loss, clipping, optimiser. The micro-batch starts at the
first size of its row and is halved until it fits. Rows stand in order of importance; the first that would end after
`--seconds` ends the table, and the record names what was left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from setting import MFU_FORMULA, device_name, drive, finish, is_out_of_memory, parse, recipe, write

from lmssl.train.peaks import peak_flops

STEPS, WARMUP = 14, 6


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    length: int
    micro_tokens: int
    changes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 25.0
    """How long it takes, by guess; beyond the time that is left it is not begun."""

    @property
    def fp8(self) -> bool:
        """Products in 8 bits need torchao, so that these rows are a stage of their own."""
        return self.changes.get("train", {}).get("precision") == "fp8"

    @property
    def name(self) -> str:
        """What sets it apart."""
        words = [f"{key}={value}" for section in self.changes.values() for key, value in section.items()]
        return ", ".join([self.model, str(self.length), *words])


MUON = {"optim": {"kind": "muon", "lr": 1e-2}}
ROWS = (
    Row("124M", 2048, 131072, seconds=40),
    Row("350M", 2048, 65536, seconds=35),
    Row("1.3B", 2048, 32768, seconds=45),
    Row("ModernBERT-base", 1024, 131072, seconds=30),
    Row("124M", 4096, 131072),
    Row("1.3B", 4096, 32768, seconds=45),
    Row("350M", 4096, 65536, seconds=30),
    Row("124M", 2048, 131072, MUON),
    Row("350M", 2048, 65536, MUON, seconds=30),
    Row("1.3B", 2048, 32768, {"train": {"precision": "fp8"}}, seconds=50),
    Row("124M", 2048, 131072, {"train": {"compile": "model"}}, seconds=90),
    Row("1.3B", 2048, 32768, MUON, seconds=50),
    Row("350M", 2048, 65536, {"train": {"compile": "model"}}, seconds=150),
)


def measure(args: argparse.Namespace, row: Row) -> dict[str, Any]:
    """Tokens/s, utilisation and memory at the largest micro-batch that fits."""
    length = 128 if args.tiny else row.length
    micro_sequences = 2 if args.tiny else row.micro_tokens // length
    steps, warmup = (3, 1) if args.tiny else (STEPS, WARMUP)
    began = time.monotonic()
    while True:
        asked = recipe(
            args,
            "mfu",
            row.model,
            length=length,
            micro_sequences=micro_sequences,
            micro_batches=2,
            steps=steps,
            **row.changes,
        )
        failed = False
        try:
            found = drive(asked, args.device, steps=steps)
        except Exception as error:
            if not is_out_of_memory(error) or micro_sequences == 1:
                raise
            failed = True  # and the error, which holds the model, is let go of
        if not failed:
            break
        micro_sequences //= 2
    rate = found.rate(warmup)
    return {
        "tokens_per_second": rate,
        "mfu": found.utilisation(rate, args.device),
        "step_seconds": found.step_seconds,
        "spread": [found.tokens_per_step / s for s in _ends(found.step_seconds[warmup:])],
        "warmup": warmup,
        "tokens_per_step": found.tokens_per_step,
        "micro_batch_sequences": micro_sequences,
        "num_parameters": found.num_parameters,
        "flops_per_token": found.flops_per_token,
        "documents_per_sequence": found.num_documents,
        "memory_bytes": found.memory_bytes,
        "losses": found.losses,
        "seconds": time.monotonic() - began,
    }


def _ends(seconds: list[float]) -> tuple[float, float]:
    """The slowest and the quickest."""
    return max(seconds), min(seconds)


def main() -> None:
    """All rows that there is time for."""
    args = parse(__doc__, only="")
    rows = [row for row in ROWS if args.only in row.name and (args.only or not row.fp8)]
    if args.tiny and not args.only:
        rows = [row for row in rows if row.model != "1.3B" and row.length != 4096]
    for row in rows:
        about = {"name": row.name, "model": row.model, "sequence_length": row.length, "changes": row.changes}
        about |= {"formula": MFU_FORMULA, "peak_flops": peak_flops(device_name(args.device), "bf16")}
        if not args.tiny and time.monotonic() + row.seconds > args.deadline:
            write(args, "mfu", **about, left_out="no time was left")
        elif row.fp8 and not _has_fp8(args):
            write(args, "mfu", **about, left_out="torchao is not installed, or the device has no fp8")
        else:
            try:
                found = measure(args, row)
            except Exception as error:  # one row that fails must not lose the others
                write(args, "mfu", **about, error=f"{type(error).__name__}: {error}"[:2000])
            else:
                write(args, "mfu", **about, **found)
                mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
                middle = statistics.median(found["step_seconds"][found["warmup"] :])
                print(
                    f"  {row.name}: {found['tokens_per_second']:,.0f} tokens/s{mfu}, {middle:.3f} s a step", flush=True
                )
    print(MFU_FORMULA)
    finish(args)


def _has_fp8(args: argparse.Namespace) -> bool:
    return args.device == "cuda" and importlib.util.find_spec("torchao") is not None


if __name__ == "__main__":
    main()
