"""Corpus -> packed sequences on disk, and random reading, against what people use; side by side in one run.

    python benchmarks/bench_data.py TEXT.jsonl[.zst] [--repeats 3] [--tokenizer tokenizer/bpe-16k] [--skip NAME]

TEXT has one document a line in the field `text`. Every entrant is a process of its own on the same text, tokenizer
and cores; rounds run A B C A B C. Peers live in an environment of their own, which is created on the first run
(.venvs/peers). Results are appended to benchmarks/results/data.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib
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

import zstandard
from environment import peers_python
from record import machine

HERE = Path(__file__).parent
OURS = {
    "lmssl, .txt": "txt",
    "lmssl, .jsonl": "jsonl",
    "lmssl, .jsonl.zst": "zst",
    "lmssl, .txt, documents of 1 KiB": "short",
    "raw engine, text in memory": "raw",
}
PEERS = {
    "datasets.map + group_texts": "data_datasets.py",
    "litdata optimize": "data_litdata.py",
    "MosaicML Streaming MDSWriter": "data_mds.py",
    "datatrove DocumentTokenizer": "data_datatrove.py",
}
BASELINE = "datasets.map + group_texts"
PADDING_LENGTHS = (512, 2048, 8192)
LARGE_WINDOW = 1000
"""Sequences from which on padding is to be small."""
_READ_BATCH = 32
"""Sequences that are asked for together."""
_PAUSE_SECONDS = 6
"""After a folder was removed: for five seconds ext4 looks past freed inodes, which costs who makes files."""


def write_text(source: Path, folder: Path, processes: int) -> int:
    """The same documents in every form an entrant reads; returns bytes of text."""
    data = source.read_bytes()
    if source.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data).read()
    texts = [json.loads(line)["text"] for line in data.split(b"\n") if line]
    (folder / "txt").mkdir()
    (folder / "parts").mkdir()
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    for i, text in enumerate(texts):
        (folder / "txt" / f"{i:06}.txt").write_text(text, encoding="utf-8", newline="")
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    packed = zstandard.ZstdCompressor(level=3).compress("".join(lines).encode())
    (folder / "text.jsonl.zst").write_bytes(packed)
    for i in range(processes):
        (folder / "parts" / f"{i}.jsonl").write_text("".join(lines[i::processes]), encoding="utf-8")
    return sum(len(text.encode()) for text in texts)


def ours(form: str, folder: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Prepare the cache and pack every window of the first epoch; then read at random positions."""
    from lmssl.data.stream import SequenceStream
    from lmssl.prepare import prepare
    from lmssl.recipe.load import load_recipe
    from lmssl.tokenizer.load import load_tokenizer

    with contextlib.suppress(ImportError):
        importlib.import_module("awkward")  # gigatoken's results; imports are not counted
    corpus = {
        "txt": {"kind": "text", "path": str(folder / "txt")},
        "short": {"kind": "text", "path": str(folder / "txt"), "section_bytes": 1024},
        "jsonl": {"kind": "jsonl", "path": str(folder / "text.jsonl")},
        "zst": {"kind": "jsonl", "path": str(folder / "text.jsonl.zst")},
    }[form]
    recipe = recipe_of(corpus, out, args)
    path = out / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    loaded = load_recipe(path).recipe
    tokenizer = load_tokenizer(Path(args.tokenizer))
    started = time.perf_counter()
    found = prepare(
        loaded, rank=0, world_size=1, workers=args.processes, clock=time.perf_counter, report=complain, console=None
    )
    stream = SequenceStream.open(loaded.data, tokenizer, seed=1, cache_dir=out / "cache", report=complain)
    count = sum(stream.num_sequences_per_epoch().values())
    seconds = time.perf_counter() - started
    row = {"seconds": seconds, "tokens": found.num_tokens, "padding_ratio": stream.totals().padding_ratio}
    if form == "jsonl":  # whole documents of every length
        row["padding"] = [padding(loaded.data, length, out, args) for length in PADDING_LENGTHS]
    if args.reads:
        row["read_tokens_per_second"] = read_rate(stream, count, args)
    return row


def padding(section: Any, length: int, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Padding of an epoch in sequences of a length, and the sequences of each window."""
    from lmssl.data.stream import SequenceStream
    from lmssl.tokenizer.load import load_tokenizer

    section = section.model_copy(update={"sequence_length": length})
    tokenizer = load_tokenizer(Path(args.tokenizer))
    stream = SequenceStream.open(section, tokenizer, seed=1, cache_dir=out / "cache", report=complain)
    stream.num_sequences_per_epoch()
    windows = stream.ledger.entries("text")
    large = [entry for entry in windows if entry.num_sequences >= LARGE_WINDOW]
    return {
        "sequence_length": length,
        "num_sequences": [entry.num_sequences for entry in windows],
        "padding_ratio": stream.totals().padding_ratio,
        "padding_ratio_large": sum(entry.num_padding for entry in large)
        / max(1, length * sum(entry.num_sequences for entry in large)),
    }


def read_rate(stream: Any, count: int, args: argparse.Namespace) -> float:
    """Tokens per second of sequences at random positions, as int64 with segments, on one core."""
    order = random.Random(1)
    positions = [order.randrange(count) for _ in range(args.reads)]
    stream.sequences(range(0, count, max(1, count // 500)))  # every window is open
    batches = [positions[i : i + _READ_BATCH] for i in range(0, len(positions), _READ_BATCH)]
    began = time.perf_counter()
    for batch in batches:
        stream.sequences(batch)
    return float(len(positions) * args.sequence_length / (time.perf_counter() - began))


def recipe_of(corpus: dict[str, Any], out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A whole recipe, of which `prepare` reads the data section only."""
    tokens = args.sequence_length * 8
    return {
        "name": "bench",
        "tokenizer": {"path": args.tokenizer},
        "data": {
            "sequence_length": args.sequence_length,
            "mixture": [{"name": "text", **corpus}],
            "validation": None,
            "eos": "wordpiece" not in args.tokenizer,  # which has no such token
            "cache": str(out / "cache"),
        },
        "objective": {"kind": "causal"},
        "model": {
            "kind": "llama",
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 64,
        },
        "optim": {"kind": "adamw", "lr": 1e-3},
        "schedule": {"kind": "linear"},
        "train": {"tokens": tokens, "batch_tokens": tokens, "micro_batch_sequences": 8},
    }


def raw(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The encoding engine alone, on text in memory, in batches as large as ours, on all cores."""
    from lmssl.tokenizer.encode import Encoder
    from lmssl.tokenizer.load import load_tokenizer

    encoder = Encoder(load_tokenizer(Path(args.tokenizer)), report=complain)
    texts: list[Any] = [path.read_bytes() for path in sorted((folder / "txt").iterdir())]
    engine: Any = encoder._fast or encoder._reference
    backend = engine._new().backend if encoder.engine == "gigatoken" else engine._backend
    if encoder.engine != "gigatoken":  # the others take no bytes
        texts = [text.decode() for text in texts]
    tokens = 0
    started = time.perf_counter()
    for start in range(0, len(texts), 64):
        batch = texts[start : start + 64]
        if encoder.engine == "gigatoken":
            tokens += len(backend.encode_batch(batch).layout.content.data)
        elif encoder.engine == "tokie":
            tokens += len(backend.encode_batch_flat(batch, add_special_tokens=False)[0])
        else:
            tokens += sum(len(found.ids) for found in backend.encode_batch_fast(batch, add_special_tokens=False))
    return {"seconds": time.perf_counter() - started, "tokens": tokens, "engine": encoder.engine}


def complain(line: str) -> None:
    """What the library reports goes to stderr."""
    print(line, file=sys.stderr)


def run(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One entrant in a fresh process and a fresh folder."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        common = ["--sequence-length", str(args.sequence_length), "--processes", str(args.processes)]
        if name in OURS:
            command = [sys.executable, __file__, str(folder), "--inner", OURS[name], "--out", out, *common]
            command += ["--tokenizer", args.tokenizer, "--reads", str(args.reads)]
        else:
            text = folder / ("parts" if "datatrove" in name else "text.jsonl")
            script = HERE / "peers" / PEERS[name]
            command = [str(peers_python()), str(script), str(Path(args.tokenizer).resolve()), str(text), out, *common]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": out, "PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    time.sleep(_PAUSE_SECONDS)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def main() -> None:
    """Run all entrants in rounds and append the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-repeats", type=int, help="rounds in which peers run, too; default: all")
    parser.add_argument("--tokenizer", default="tokenizer/bpe-16k")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--reads", type=int, default=20000, help="sequences read at random; 0: none")
    parser.add_argument("--skip", action="append", default=[], choices=[*OURS, *PEERS])
    parser.add_argument("--inner", choices=list(OURS.values()), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "results/data.jsonl")
    args = parser.parse_args()
    if args.inner:
        print(json.dumps(raw(args.text, args) if args.inner == "raw" else ours(args.inner, args.text, args.out, args)))
        return
    names = [name for name in (*OURS, *PEERS) if name not in args.skip]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        num_bytes = write_text(args.text, folder, args.processes)
        for repeat in range(args.repeats):
            for name in names:
                if name in PEERS and args.peer_repeats is not None and repeat >= args.peer_repeats:
                    continue
                rows[name].append(run(name, folder, args))
                rate = rows[name][-1]["tokens"] / rows[name][-1]["seconds"]
                print(f"round {repeat + 1}  {name:32} {rate / 1e6:8.2f} M tokens/s", flush=True)
    write(args, num_bytes, rows)


def write(args: argparse.Namespace, num_bytes: int, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Append one record."""
    base = [row["seconds"] for row in rows[BASELINE]] if BASELINE in rows else None
    entrants = []
    for name, found in rows.items():
        seconds = [row["seconds"] for row in found]
        entrants.append(
            {
                "name": name,
                "seconds": seconds,
                "tokens": found[0]["tokens"],
                "tokens_per_second": [row["tokens"] / row["seconds"] for row in found],
                "bytes_per_second": [num_bytes / row["seconds"] for row in found],
                "ratio_to_baseline": [a / b for a, b in zip(base, seconds, strict=False)] if base else None,
                "read_tokens_per_second": [row["read_tokens_per_second"] for row in found]
                if "read_tokens_per_second" in found[0]
                else None,
                "padding_ratio": found[0].get("padding_ratio"),
            }
        )
        print(f"{name:32} {statistics.median(entrants[-1]['tokens_per_second']) / 1e6:8.2f} M tokens/s")
    record = {
        "benchmark": f"data, {Path(args.tokenizer).name}",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/bench_data.py", args.text.name, *sys.argv[2:]]),
        "text": {
            "name": args.text.name,
            "bytes": num_bytes,
            "sha256": hashlib.sha256(args.text.read_bytes()).hexdigest()[:16],
        },
        "tokenizer": Path(args.tokenizer).name,
        "sequence_length": args.sequence_length,
        "processes": args.processes,
        "machine": machine(),
        "padding": next((found[0]["padding"] for found in rows.values() if "padding" in found[0]), []),
        "entrants": entrants,
    }
    args.out.parent.mkdir(exist_ok=True)
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
