"""Model FLOPs utilisation of stock models, packed with document attention, in bf16; and tokens/s of ModernBERT-base.

    python benchmarks/gpu/mfu.py --out FOLDER --scratch FOLDER [--device cpu --tiny] [--set further] [--only 'A|B']

Each row is lmssl's own session: loader, compiled layers, loss, clipping, optimiser. The micro-batch starts at the
first size of its row and is halved until it fits. Rows stand in order of importance; one that would end after
`--until`, by guess, is left out, and the record says so. Rows of `--set variants` are what lmssl does not do: they tell
what a change would gain before it is made.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kernel_times import cudnn
from rows import Row, device_name, finish, run_rows
from setting import DOCUMENTS_FORMULA, MFU_FORMULA, drive, is_out_of_memory, parse, recipe

from lmssl.model import head
from lmssl.train import opening
from lmssl.train.peaks import peak_flops

STEPS, WARMUP = 14, 6


@dataclass(frozen=True)
class Planned:
    """One line of the table."""

    model: str
    length: int
    micro_tokens: int
    changes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 22.0
    """How long it takes, by guess."""
    variant: str = ""
    """Of `VARIANTS`: what is done in another way."""

    @property
    def fp8(self) -> bool:
        """Products in 8 bits need torchao, so that these rows are a stage of their own."""
        return self.changes.get("train", {}).get("precision") == "fp8"

    @property
    def name(self) -> str:
        """What sets it apart."""
        words = [f"{key}={value}" for section in self.changes.values() for key, value in section.items()]
        return ", ".join([self.model, str(self.length), *words, *filter(None, [self.variant])])


@contextmanager
def larger_chunks() -> Iterator[None]:
    """Four times as many targets in a chunk of logits."""
    plain = dict(head.LOGITS_BYTES), head._GPU_BYTES_PER_TARGET
    head.LOGITS_BYTES["cuda"], head._GPU_BYTES_PER_TARGET = 4 * plain[0]["cuda"], 4 * plain[1]
    try:
        yield
    finally:
        head.LOGITS_BYTES.update(plain[0])
        head._GPU_BYTES_PER_TARGET = plain[1]


@contextmanager
def narrow_residuals() -> Iterator[None]:
    """What layers add to is of 16 bits, from the embedding on; norms still compute in float32."""
    plain = opening.build_recipe_model

    def build(*args: Any, **kwargs: Any) -> Any:
        model = plain(*args, **kwargs)
        model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, out: out.bfloat16())
        return model

    opening.build_recipe_model = build
    try:
        yield
    finally:
        opening.build_recipe_model = plain


VARIANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "": nullcontext,
    "attention by cuDNN": lambda: cudnn(True),
    "chunks of logits four times as large": larger_chunks,
    "residuals in bf16": narrow_residuals,
}


MUON = {"optim": {"kind": "muon", "lr": 1e-2}}
MODEL = {"train": {"compile": "model"}}
SETS = {
    "required": (
        Planned("124M", 2048, 131072, seconds=30),
        Planned("350M", 2048, 65536, seconds=30),
        Planned("ModernBERT-base", 1024, 131072, seconds=30),
        Planned("124M", 4096, 131072),
        Planned("1.3B", 2048, 32768, seconds=35),
    ),
    "fp8": (Planned("1.3B", 2048, 32768, {"train": {"precision": "fp8"}}, seconds=35),),
    "further": (
        Planned("124M", 2048, 131072, MUON),
        Planned("350M", 2048, 65536, MUON),
        Planned("124M", 2048, 131072, MODEL, seconds=60),
        Planned("1.3B", 4096, 32768, seconds=35),
        Planned("350M", 4096, 65536),
        Planned("1.3B", 2048, 32768, MUON, seconds=40),
        Planned("350M", 2048, 65536, MODEL, seconds=120),
    ),
    "variants": tuple(
        Planned(model, 2048, tokens, variant=variant)
        for model, tokens in (("124M", 131072), ("350M", 65536))
        for variant in list(VARIANTS)[1:]
    ),
}
"""In order of importance; each set is a stage of gpu.sh."""


def measure(args: argparse.Namespace, row: Planned) -> dict[str, Any]:
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
            with VARIANTS[row.variant]():
                found = drive(asked, args.device, steps=steps)
        except Exception as error:
            if not is_out_of_memory(error) or micro_sequences == 1:
                raise
            failed = True  # and the error, which holds the model, is let go of
        if not failed:
            break
        micro_sequences //= 2
    rate = found.rate(warmup)
    middle = statistics.median(found.step_seconds[warmup:])
    print(f"  {row.name}: {rate:,.0f} tokens/s, {middle:.3f} s a step", flush=True)
    return {
        "tokens_per_second": rate,
        **found.utilisation(rate, args.device),
        "step_seconds": found.step_seconds,
        "spread": [found.tokens_per_step / s for s in _ends(found.step_seconds[warmup:])],
        "warmup": warmup,
        "tokens_per_step": found.tokens_per_step,
        "micro_batch_sequences": micro_sequences,
        "num_parameters": found.num_parameters,
        "flops_per_token": found.flops_per_token,
        "document_flops_per_token": found.document_flops_per_token,
        "documents_per_sequence": found.num_documents,
        "memory_bytes": found.memory_bytes,
        "losses": found.losses,
        "seconds": time.monotonic() - began,
    }


def _ends(seconds: list[float]) -> tuple[float, float]:
    """The slowest and the quickest."""
    return max(seconds), min(seconds)


def rows_of(args: argparse.Namespace) -> list[Planned]:
    """Those of the set that was asked for whose names hold one of the asked texts."""
    asked = [text for text in args.only.split("|") if text]
    rows = [row for row in SETS[args.set] if not asked or any(text in row.name for text in asked)]
    if args.tiny and args.set != "fp8":
        rows = [row for row in rows if row.model != "1.3B" and row.length != 4096]
    return rows


def main() -> None:
    """All rows that there is time for."""
    args = parse(__doc__, only="", set="required")
    planned = []
    for row in rows_of(args):
        about = {"name": row.name, "model": row.model, "sequence_length": row.length, "changes": row.changes}
        about |= {"formula": MFU_FORMULA, "documents_formula": DOCUMENTS_FORMULA}
        about |= {"peak_flops": peak_flops(device_name(args.device), "bf16")}
        why = "torchao is not installed, or the device has no fp8" if row.fp8 and not _has_fp8(args) else ""
        planned.append(Row(about, partial(measure, args, row), row.seconds, why))
    run_rows(args, "mfu", planned)
    print(MFU_FORMULA)
    print(DOCUMENTS_FORMULA)
    finish(args)


def _has_fp8(args: argparse.Namespace) -> bool:
    return args.device == "cuda" and importlib.util.find_spec("torchao") is not None


if __name__ == "__main__":
    main()
