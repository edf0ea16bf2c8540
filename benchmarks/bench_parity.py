"""How equal the run is under every backend: loss, weights, optimiser states and averages against one process.

    python benchmarks/bench_parity.py

A small llama, 24 rows of unequal paragraphs a step in three micro-batches a process, a clipped norm, 20 steps; on CPU
over gloo, in the processes of one launch that are set up as recipes/launch sets them up. The runs are those of
tests/numerics/test_parity.py, which says how much is allowed. Results are appended to benchmarks/results/parity.jsonl;
they do not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import record
import torch

from lmssl.recipe.load import load_recipe
from lmssl.train.run import train

sys.path.insert(0, str(record.HERE.parent / "tests"))

from launched_runs import STEPS, differences, recipe_of, run_segments
from runs import metrics

KINDS: dict[str, dict[str, Any]] = {
    "AdamW, fp32": {},
    "AdamW, bf16": {"train.precision": "bf16"},
    "Muon, fp32": {
        "optim": {
            "kind": "muon",
            "lr": 3e-3,
            "max_grad_norm": 0.5,
            "momentum_warmup": {"from_momentum": 0.8, "tokens": 64 * 24 * 15},
        }
    },
}
TWO = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
BACKENDS = {
    "AdamW, fp32": {2: TWO, 4: ("hsdp",)},
    "AdamW, bf16": {2: ("ddp", "fsdp2", "zero2", "zero3")},
    "Muon, fp32": {2: ("ddp", "fsdp2"), 4: ("hsdp",)},
}
"""By number of processes; DeepSpeed refuses Muon."""
NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "hsdp": "HSDP 2x2"} | {
    f"zero{stage}{more}": f"ZeRO-{stage}{more.replace('-', ' ')}" for stage in "123" for more in ("", "-offload")
}


def python_text(folder: Path) -> Path:
    """Python's language reference as four files."""
    folder.mkdir()
    names = sorted(topics)
    for number in range(4):
        text = "\n\n".join(topics[name] for name in names[number::4])
        (folder / f"part-{number}.txt").write_text(text, encoding="utf-8")
    return folder


def recipe(folder: Path, kind: str, backend: str, processes: int) -> Path:
    """The same batches for any number of processes, in three micro-batches each."""
    name = f"{kind.partition(',')[0].lower()}-{kind[-4:]}-{backend}"
    rows = {"train.micro_batch_sequences": 3} if processes == 4 else {}
    return recipe_of(folder, folder / "text", name, **KINDS[kind], **rows)


def compared(ours: Path, theirs: Path) -> dict[str, float]:
    """The largest differences: of a loss of any step or evaluation, and of a number in each group at the end."""
    losses = [[row["loss"] for row in metrics(run)] for run in (ours, theirs)]
    largest = max(abs(a - b) for a, b in zip(*losses, strict=True))
    return {"loss": largest, **differences(ours, theirs, STEPS)}


def measure(folder: Path, backends: dict[str, dict[int, tuple[str, ...]]]) -> list[dict[str, Any]]:
    """All runs, and how they differ from that of one process."""
    python_text(folder / "text")
    planned = [(kind, count, name) for kind, by in backends.items() for count, names in by.items() for name in names]
    for processes in sorted({count for _, count, _ in planned}):
        here = [(kind, name) for kind, count, name in planned if count == processes]
        plan = [{"backend": name, "recipe": str(recipe(folder, kind, name, processes))} for kind, name in here]
        run_segments(folder / "plan.json", plan, processes=processes)
    found = []
    for kind in backends:
        single = train(load_recipe(recipe(folder, kind, "single", 1)))
        losses = [row["loss"] for row in metrics(single) if row["kind"] == "train"]
        for _, processes, name in (one for one in planned if one[0] == kind):
            theirs = folder / recipe(folder, kind, name, processes).stem
            row: dict[str, Any] = {"kind": kind, "backend": NAMES[name], "processes": processes}
            found.append(row | compared(single, theirs) | {"first_loss": losses[0], "last_loss": losses[-1]})
            print(found[-1], flush=True)
    return found


def main() -> None:
    """Train, compare and append the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="one backend, printed only, to try the script")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as the launched processes
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), {"Muon, fp32": {2: ("ddp",)}} if args.tiny else BACKENDS)
    record.write(record.place(args, "parity"), "parity", "bench_parity.py", steps=STEPS, rows=rows)


if __name__ == "__main__":
    main()
