"""Peak memory of a training step by the size of the vocabulary, without what parameters themselves take.

    python benchmarks/bench_memory.py [--vocabularies 1024 131072] [--tokens 8192] [--repeats 3] [--tiny]

The step is forward, backward, clipping and AdamW's update of a llama in bf16, as `lmssl train` makes it, compiled or
not. Each measurement is a fresh process: after warm-up steps it resets the kernel's mark of its peak (Linux), makes two
more steps, and takes off what was resident before them (weights, optimiser states, libraries) and the gradients.
glibc is told to give freed memory back at once, so that resident memory is what is in use. What remains are
activations, logits and whatever else the step keeps for a while, such as copies of the head in bf16. Asked: with 128k
at most 1.15 times that with 1k. Results are appended to benchmarks/results/memory.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from record import last_json, place, run, write

from lmssl.model.build import build_config, build_model
from lmssl.objective.causal import CausalObjective
from lmssl.objective.module import LossModule
from lmssl.optim.groups import build_optimizer
from lmssl.recipe.model import LlamaModel
from lmssl.recipe.optim import AdamW

BACK_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
"""Environment variables of glibc."""
WAYS = ("eager", "compiled")


def status_bytes(name: str) -> int:
    """A line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(vocabulary: int, compiled: bool, args: argparse.Namespace) -> dict[str, float]:
    """What two steps take beyond parameters, in bytes."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    section = LlamaModel(
        kind="llama",
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        tie_word_embeddings=True,
    )
    config = build_config(section, vocab_size=vocabulary, sequence_length=args.length, tokenizer=None)
    model = build_model(config, objective="causal", seed=1)
    module = LossModule(model, CausalObjective(), bf16=args.precision == "bf16").train()
    optimizer = build_optimizer(model, AdamW(kind="adamw", lr=1e-3))
    if compiled:
        module.compile(dynamic=False)
    shape = args.tokens // args.length, args.length
    ids_BT = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(1))
    inputs = {
        "ids_BT": ids_BT,
        "segments_BT": torch.arange(args.length).div(100, rounding_mode="floor").add(1).expand_as(ids_BT).contiguous(),
        "offsets_BT": torch.arange(args.length).remainder(100).expand_as(ids_BT).contiguous(),
        "targets_BT": ids_BT.roll(-1, 1),
    }

    def step() -> None:
        (module(inputs)["causal"] / args.tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    gc.collect()
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is resident now
    for _ in range(2):
        step()
    gradients = 4 * sum(p.numel() for p in model.parameters())
    peak = status_bytes("VmHWM")
    return {"step_bytes": peak - before - gradients, "parameter_bytes": 4 * gradients, "peak_bytes": peak}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs=2, default=[1024, 131_072])
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a model too small to mean anything, to try the script")
    parser.add_argument("--inner", nargs=2, metavar=("VOCABULARY", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default: the results; with --tiny the record is printed")
    args = parser.parse_args()
    if args.tiny:
        args.vocabularies, args.tokens, args.length, args.width, args.layers = [1024, 8192], 512, 128, 64, 2
        args.repeats, args.ways = 1, ["eager"]
    return args


def main() -> None:
    """Every vocabulary in turn, and the record."""
    args = parse()
    if args.inner:
        print(json.dumps(measure(int(args.inner[0]), args.inner[1] == "compiled", args)))
        return
    entrants: list[dict[str, Any]] = []
    for way in args.ways:
        rows: dict[int, list[dict[str, float]]] = {size: [] for size in args.vocabularies}
        for _ in range(args.repeats):
            for size in args.vocabularies:
                command = [sys.executable, __file__, *sys.argv[1:], "--inner", str(size), way]
                rows[size].append(last_json(run(command, **BACK_AT_ONCE)))
                print(f"{way}, vocabulary {size:,}: {rows[size][-1]['step_bytes'] / 1e6:,.0f} MB", flush=True)
        small, large = (statistics.median(row["step_bytes"] for row in rows[size]) for size in args.vocabularies)
        found = {str(size): of_size for size, of_size in rows.items()}
        entrants.append({"name": way, "rows": found, "ratio": large / small})
    write(
        place(args, "memory"),
        "memory",
        "bench_memory.py",
        tokens=args.tokens,
        sequence_length=args.length,
        width=args.width,
        layers=args.layers,
        vocabularies=args.vocabularies,
        entrants=entrants,
    )


if __name__ == "__main__":
    main()
