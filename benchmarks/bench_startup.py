"""Seconds until `lmssl --help` and `lmssl show` have answered, as whole processes.

python benchmarks/bench_startup.py [--repeats 11]
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path

from record import HERE, machine

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "lmssl --help": [sys.executable, "-m", "lmssl", "--help"],
    "lmssl show recipes/pretrain/gpt-125m.yaml": [
        sys.executable,
        "-m",
        "lmssl",
        "show",
        "recipes/pretrain/gpt-125m.yaml",
        "optim.lr=1e-3",
    ],
}


def seconds(command: list[str]) -> float:
    """Wall seconds of one process."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=HERE.parent)
    return time.perf_counter() - started


def main() -> None:
    """Time each command in turn, several rounds, and append the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, default=HERE / "results/startup.jsonl")
    args = parser.parse_args()
    for command in COMMANDS.values():
        seconds(command)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.repeats):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    record = {
        "benchmark": "startup",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": f"python benchmarks/bench_startup.py --repeats {args.repeats}",
        "machine": machine(),
        "entrants": [{"name": name, "seconds": found} for name, found in times.items()],
    }
    args.out.parent.mkdir(exist_ok=True)
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    for name, found in times.items():
        print(f"{name:45} {sorted(found)[len(found) // 2]:.3f} s")


if __name__ == "__main__":
    main()
