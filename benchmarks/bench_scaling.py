"""Weak scaling from one process to two on CPU, and what each backend sends per step against the least it could.

    python benchmarks/bench_scaling.py [--repeats 3] [--steps 14] [--tiny]

Weak scaling: every process has one thread and the same rows a step; one process, two that train apart at the same
time (what sharing a machine costs by itself), and two under DDP, A B C A B C. Efficiency is seconds of a step of one
process / seconds of a step of two. Volume: one short run of two processes for each backend with every collective
counted (counted_training.py). The least that a backend's division of labour allows, G being the bytes of all gradients
in float32 and n processes: 2 (n - 1) / n G where weights are whole on every rank (DDP, ZeRO-1 and -2), 3 (n - 1) / n G
where they are gathered for forward and for backward (FSDP2, ZeRO-3).
Results are appended to benchmarks/results/scaling.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from entrants import prepare, recipe_of, train_rows
from record import HERE, place, run, without_compiling, write

LEAST = {"ddp": 2, "fsdp2": 3, "zero1": 2, "zero2": 2, "zero3": 3}
"""Times (n - 1) / n of the bytes of gradients."""
WAYS = ("one process", "two apart", "two, DDP")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def launcher(backend: str) -> list[str]:
    """Two processes with a file of recipes/launch."""
    file = HERE.parent / f"recipes/launch/{backend}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*command, "--num_processes", "2", "--main_process_port", "0"]


def environment(backend: str) -> dict[str, str]:
    """DDP is told that it is on CPU; the others find out."""
    return ONE_THREAD | ({"ACCELERATE_USE_CPU": "true"} if backend == "ddp" else {})


def written(folder: Path, section: dict[str, Any], args: argparse.Namespace, name: str, **changes: Any) -> Path:
    """A recipe; `changes` are fields of its section `train`."""
    recipe = recipe_of(folder, section, args, name)
    recipe["train"] |= changes
    recipe["data"] |= {"cache": str(folder / "cache"), "workers": 0}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def step_seconds(folder: Path, section: dict[str, Any], args: argparse.Namespace, way: str, name: str) -> float:
    """Median seconds of a step; where two train apart, the slower one's."""
    tokens, lmssl = args.rows * args.length, ["-m", "lmssl", "train"]
    names, changes, command = [name], {}, [sys.executable]
    if way == "two apart":
        names = [f"{name}-{i}" for i in range(2)]
    elif way == "two, DDP":
        changes = {"batch_tokens": 2 * tokens, "tokens": 2 * tokens * args.steps}
        command = launcher("ddp")
    recipes = [written(folder, section, args, one, **changes) for one in names]
    with ThreadPoolExecutor() as pool:
        backend = "ddp" if way == "two, DDP" else ""
        commands = [[*command, *lmssl, str(recipe)] for recipe in recipes]
        list(pool.map(lambda words: run(words, **environment(backend)), commands))
    found = [[row["time"]["seconds"] for row in train_rows(folder / f"run-{one}")] for one in names]
    return max(statistics.median(seconds[args.warmup :]) for seconds in found)


def volume(folder: Path, section: dict[str, Any], args: argparse.Namespace, backend: str) -> dict[str, Any]:
    """Bytes that a rank sends in a step."""
    name, tokens = f"volume-{backend}", 2 * args.rows * args.length
    recipe = written(folder, section, args, name, batch_tokens=tokens, tokens=3 * tokens, compile="off")
    out = folder / f"{name}.json"
    command = [*launcher(backend), str(HERE / "counted_training.py"), str(out), str(recipe)]
    run(command, **environment(backend))
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    least = LEAST[backend] * (found["ranks"] - 1) / found["ranks"] * 4 * found["parameters"]
    sent = sum(found["sent_bytes"].values())
    return {"backend": backend, **found, "total_bytes": sent, "least_bytes": least, "ratio": sent / least}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="of a process")
    parser.add_argument("--backends", nargs="+", choices=list(LEAST), default=list(LEAST))
    parser.add_argument("--tiny", action="store_true", help="a model too small to mean anything, to try the script")
    parser.add_argument("--out", type=Path, help="default: the results; with --tiny the record is printed")
    args = parser.parse_args()
    args.objective = "causal"
    if args.tiny:
        without_compiling()
        args.repeats, args.steps, args.warmup, args.length, args.rows, args.backends = 1, 4, 2, 64, 2, ["ddp"]
    return args


def main() -> None:
    """Both measurements and the record."""
    args = parse()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        section = prepare(folder, args)
        run([sys.executable, "-m", "lmssl", "prepare", str(written(folder, section, args, "prepared"))])
        for repeat in range(args.repeats):
            for number, way in enumerate(WAYS):
                seconds[way].append(step_seconds(folder, section, args, way, f"{number}-{repeat}"))
                print(f"round {repeat + 1}  {way:12} {seconds[way][-1]:.3f} s a step", flush=True)
        volumes = []
        for backend in args.backends:
            try:
                volumes.append(volume(folder, section, args, backend))
            except SystemExit as error:  # one backend that fails does not lose the others
                volumes.append({"backend": backend, "error": str(error)[-500:]})
            print({key: volumes[-1].get(key) for key in ("backend", "total_bytes", "ratio", "error")}, flush=True)
    write(
        place(args, "scaling"),
        "scaling",
        "bench_scaling.py",
        model=section,
        sequence_length=args.length,
        rows=args.rows,
        step_seconds=seconds,
        efficiency={
            way: [one / two for one, two in zip(seconds[WAYS[0]], seconds[way], strict=True)] for way in WAYS[1:]
        },
        volumes=volumes,
    )


if __name__ == "__main__":
    main()
