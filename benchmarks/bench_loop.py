"""What the training loop costs beside forward, backward and optimiser, on the CPU debug recipe.

    python benchmarks/bench_loop.py [RECIPE] [KEY=VALUE ...]

Trains in a temporary folder, leaves the first lines out (compiling, cold caches), and prints where the time of a step
went. Overhead is all but "forward and backward" and "update"; the aim is at most 3 % of a step.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from lmssl.recipe.load import load_recipe
from lmssl.shipped import find
from lmssl.train.run import train

LEFT_OUT_LINES = 2
COUNTED = ("forward_and_backward", "update")


def main(arguments: list[str]) -> None:
    recipe = find(Path(arguments[0] if arguments and "=" not in arguments[0] else "recipes/debug/gpt-llama.yaml"))
    overrides = [argument for argument in arguments if "=" in argument]
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"out={folder}/run", "evaluate.every_steps=null", "checkpoint.every_steps=null"]
        run = train(load_recipe(recipe, [*fixed, *overrides]))
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    steps = rows[-1]["step"] - rows[LEFT_OUT_LINES - 1]["step"]
    rows = rows[LEFT_OUT_LINES:]
    seconds = sum(row["time"]["seconds"] for row in rows)
    names = rows[0]["time"]["phase_seconds"]
    phases = {name: sum(row["time"]["phase_seconds"][name] for row in rows) for name in names}
    print(f"\n{steps} steps, {seconds / steps * 1000:.2f} ms a step")
    for name, spent in phases.items():
        print(f"{name:22} {spent / steps * 1000:9.3f} ms {spent / seconds:8.2%}")
    overhead = seconds - sum(phases[name] for name in COUNTED)
    print(f"{'loop overhead':22} {overhead / steps * 1000:9.3f} ms {overhead / seconds:8.2%}")


if __name__ == "__main__":
    main(sys.argv[1:])
