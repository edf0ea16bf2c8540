"""What the training loop costs beside forward, backward and optimiser, on the CPU debug recipe.

    python benchmarks/bench_loop.py [--steps 400] [RECIPE] [KEY=VALUE ...]

Trains in a temporary folder, without evaluations and saves, leaves the first lines out (cold caches), and counts where
the time of a step went. Overhead is all but "forward and backward" and "update"; the aim is less than 3 % of a step.
Results are appended to benchmarks/results/loop.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import record

from lmssl.recipe.load import load_recipe
from lmssl.shipped import find
from lmssl.train.run import train

LINE_STEPS = 5
LEFT_OUT_LINES = 2
COUNTED = ("forward_and_backward", "update")


def measure(recipe: Path, overrides: list[str], steps: int) -> dict[str, list[float]]:
    """Milliseconds of a step by phase, of the whole and of the overhead; one number for each line of metrics."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = steps * load_recipe(recipe, overrides).recipe.train.batch_tokens
        fixed = [f"out={folder}/run", "evaluate.every_steps=null", "checkpoint.every_steps=null"]
        fixed += [f"train.log_every_steps={LINE_STEPS}", f"train.tokens={tokens}"]
        run = train(load_recipe(recipe, [*overrides, *fixed]))
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row["time"] for row in map(json.loads, lines) if row["kind"] == "train"][LEFT_OUT_LINES:]
    found = {name: [row["phase_seconds"][name] for row in rows] for name in rows[0]["phase_seconds"]}
    found["step"] = [row["seconds"] for row in rows]
    found["loop overhead"] = [row["seconds"] - sum(row["phase_seconds"][name] for name in COUNTED) for row in rows]
    return {name: [1000 * seconds / LINE_STEPS for seconds in values] for name, values in found.items()}


def main() -> None:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/debug/gpt-llama.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=400, help=f"a multiple of {LINE_STEPS}")
    parser.add_argument("--tiny", action="store_true", help="few steps, printed only, to try the script")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    steps = LINE_STEPS * (LEFT_OUT_LINES + 2) if args.tiny else args.steps
    if steps % LINE_STEPS:
        parser.error(f"--steps must be a multiple of {LINE_STEPS}")
    found = measure(find(Path(args.recipe)), args.overrides, steps)
    whole = sum(found["step"])
    for name, values in found.items():
        print(f"{name:22} {statistics.median(values):9.3f} ms {sum(values) / whole:8.2%}")
    fields: dict[str, Any] = {"recipe": args.recipe, "overrides": args.overrides, "steps": steps}
    fields |= {"line_steps": LINE_STEPS, "milliseconds": {k: [round(v, 4) for v in vs] for k, vs in found.items()}}
    record.write(record.place(args, "loop"), "loop", "bench_loop.py", **fields)


if __name__ == "__main__":
    main()
