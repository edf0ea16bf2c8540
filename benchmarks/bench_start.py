"""How long until the first batch, and how much memory: un-prepared, at position 0 and at position 10^7.

    python benchmarks/bench_start.py TEXT_FOLDER [--pattern '**/*'] [--repeats 3] [--tokenizer tokenizer/bpe-16k]

TEXT_FOLDER holds real text; every matching file in UTF-8 of at most 1 MB becomes a document of JSON lines, in files of
64 MB. (The memory for one huge document is another question.) Each figure is of a fresh process; model build and
compilation are no part of it. Results are appended to benchmarks/results/start.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import machine

HERE = Path(__file__).parent
SEED = 1
_LOOK_SECONDS = 0.02
"""Between two looks at the memory of a command's processes; each one's peak only ever rises."""
MAX_DOCUMENT_BYTES, FILE_BYTES = 10**6, 64 * 10**6


def write_text(source: Path, pattern: str, large: Path, small: Path) -> int:
    """All documents, shuffled, in `large`, the first tenth of the files also in `small`; returns bytes of text."""
    paths = sorted(path for path in source.glob(pattern) if path.is_file())
    random.Random(SEED).shuffle(paths)
    lines, size, total, count = list[str](), 0, 0, 0
    large.mkdir()
    small.mkdir()
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip() or len(text) > MAX_DOCUMENT_BYTES:
            continue
        lines.append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        size, total = size + len(text), total + len(text.encode())
        if size >= FILE_BYTES or path == paths[-1]:
            (large / f"{count:04}.jsonl").write_text("".join(lines), encoding="utf-8")
            lines, size, count = [], 0, count + 1
    for number in range(max(1, count // 10)):
        os.link(large / f"{number:04}.jsonl", small / f"{number:04}.jsonl")
    return total


def write_recipe(path: Path, text: Path, args: argparse.Namespace) -> Path:
    """A recipe whose cache lies beside it."""
    from bench_data import recipe_of

    path.parent.mkdir(parents=True)
    recipe = recipe_of({"kind": "jsonl", "path": str(text)}, path.parent, args)
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def open_stream(args: argparse.Namespace) -> Any:
    """The stream of a recipe, with the ledger of a checkpoint where one is given."""
    from lmssl.data.ledger import Ledger
    from lmssl.data.stream import SequenceStream
    from lmssl.recipe.load import load_recipe
    from lmssl.tokenizer.load import load_tokenizer

    section = load_recipe(args.text).recipe.data
    ledger = Ledger.load(args.ledger) if args.ledger and args.ledger.exists() else None
    return SequenceStream.open(section, load_tokenizer(Path(args.tokenizer)), SEED, Path(section.cache), ledger)


def first_batch(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to open the stream and to have the first batch of 8 sequences from a position on."""
    from lmssl.data.batch import training_batches
    from lmssl.recipe.batches import BatchPlan

    began = time.perf_counter()
    stream = open_stream(args)
    batches = training_batches(
        stream,
        plan=BatchPlan.even(8),
        micro_batch_sequences=8,
        world_size=1,
        rank=0,
        start_step=args.position // 8,
        num_steps=10**9,
        prepare=lambda batch: batch,
        workers=0,
    )
    (batch,) = next(batches)
    seconds = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]
    return {"seconds": seconds, "ids": int(batch.ids_BT.sum()), "memory_bytes": peak()}


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """`lmssl prepare`: seconds, and the peak memory of its main process, to which `run` adds that of the others."""
    from lmssl.cli import main

    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = main(["prepare", str(args.text)])
    assert status == 0
    assert "torch" not in sys.modules
    row = {"seconds": time.perf_counter() - began, "said": said.getvalue().strip().splitlines()[-1]}
    return {**row, "memory_bytes": peak()}


def write_ledger(args: argparse.Namespace) -> dict[str, Any]:
    """What a checkpoint at a position would hold."""
    began = time.perf_counter()
    stream = open_stream(args)
    stream.ledger_at(args.position + 8).save(args.ledger)
    return {
        "seconds": time.perf_counter() - began,
        "bytes": args.ledger.stat().st_size,
        "epochs": stream.epochs_at(args.position),
        "memory_bytes": peak(),
    }


def peak(pid: int | str = "self") -> int:
    """Peak memory of a process in bytes; mapped files count where touched."""
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    lines = Path("/proc", str(pid), "status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and theirs."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(path.parent.name))
    found = parents.get(pid, []).copy()
    for child in found:
        found += parents.get(child, [])
    return found


TASKS = {"first_batch": first_batch, "prepare": prepare, "write_ledger": write_ledger}


def run(task: str, recipe: Path, args: argparse.Namespace, position: int = 0, ledger: Path | None = None) -> Any:
    """One task in a fresh process."""
    command = [sys.executable, __file__, str(recipe), "--task", task, "--position", str(position)]
    command += ["--tokenizer", args.tokenizer, *(["--ledger", str(ledger)] if ledger else [])]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True, env=env)
        peaks: dict[int, int] = {}
        while process.poll() is None:
            for pid in (process.pid, *descendants(process.pid)):
                with contextlib.suppress(OSError, StopIteration):
                    peaks[pid] = max(peaks.get(pid, 0), peak(pid))
            time.sleep(_LOOK_SECONDS)
        said.seek(0)
        printed = said.read()
    if process.returncode:
        raise SystemExit(f"{task} failed:\n{printed[-3000:]}")
    row = json.loads(next(line for line in reversed(printed.splitlines()) if line.startswith("{")))
    others = sum(found for pid, found in peaks.items() if pid != process.pid)
    row |= {"memory_bytes": row["memory_bytes"] + others, "processes": len(peaks)}
    print(f"{task:12} {recipe.parent.name:8} {position:10} {json.dumps(row)}", flush=True)
    return row


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All figures, by name."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(args.repeats):
        for name, label in (("large", "un-prepared"), ("small", "un-prepared, small")):
            cold = write_recipe(folder / f"cold-{name}{repeat}" / "recipe.json", folder / name, args)
            rows.setdefault(f"first batch, {label}", []).append(run("first_batch", cold, args))
    recipes = {}
    for repeat in range(args.repeats):
        for name in ("small", "large"):
            recipes[name] = write_recipe(folder / f"{name}{repeat}" / "recipe.json", folder / name, args)
            rows.setdefault(f"prepare, {name}", []).append(run("prepare", recipes[name], args))
    far, ledger = args.position, folder / "ledger.jsonl"
    rows["ledger of the far position"] = [run("write_ledger", recipes["large"], args, far, ledger)]
    for _ in range(args.starts):
        rows.setdefault("first batch, position 0", []).append(run("first_batch", recipes["large"], args))
        rows.setdefault("first batch, far position", []).append(run("first_batch", recipes["large"], args, far, ledger))
        rows.setdefault("first batch, small, position 0", []).append(run("first_batch", recipes["small"], args))
    return rows


def main() -> None:
    """Measure and append one record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--pattern", default="**/*")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--starts", type=int, default=9, help="repeats of first batches of what is prepared")
    parser.add_argument("--tokenizer", default="tokenizer/bpe-16k")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--position", type=int, default=10**7)
    parser.add_argument("--out", type=Path, default=HERE / "results/start.jsonl")
    parser.add_argument("--task", choices=list(TASKS), help=argparse.SUPPRESS)
    parser.add_argument("--ledger", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(TASKS[args.task](args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        num_bytes = write_text(args.text, args.pattern, folder / "large", folder / "small")
        rows = measure(args, folder)
        record = {
            "benchmark": "start",
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/bench_start.py", args.text.name, *sys.argv[2:]]),
            "text": {"name": args.text.name, "bytes": num_bytes},
            "tokenizer": Path(args.tokenizer).name,
            "sequence_length": args.sequence_length,
            "position": args.position,
            "machine": machine(),
            "memory": "tree",
            "rows": rows,
        }
    args.out.parent.mkdir(exist_ok=True)
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    for name, found in rows.items():
        seconds = statistics.median(row["seconds"] for row in found)
        print(f"{name:32} {seconds:8.2f} s  {max(row['memory_bytes'] for row in found) / 1e6:8.0f} MB")


if __name__ == "__main__":
    main()
