"""What every benchmark shares: where results lie, what machine it is, fresh processes, one line of JSON a record."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_BF16_FLAGS = frozenset(("amx_bf16", "avx512_bf16"))
"""What multiplies bfloat16; processors of one name differ in it, and training rates with them."""
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers")


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown")
    flags = next((line.split(":")[1].split() for line in _cpuinfo() if line.startswith("flags")), [])
    versions = {name: version(name) for name in _PACKAGES}
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    return {
        "cpu": model,
        "bf16": sorted(_BF16_FLAGS.intersection(flags)),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **versions,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def shown_command(script: str, words: list[str], **names: str) -> str:
    """A command as others can run it: what follows `--work` becomes WORK, if `names` says so.

    >>> shown_command("bench_optim.py", ["--steps", "50", "--work", "/somewhere"], work="WORK")
    'python benchmarks/bench_optim.py --steps 50 --work WORK'
    """
    shown = [names.get(before.removeprefix("--"), word) for before, word in zip(["", *words], words, strict=False)]
    return shlex.join(["python", f"benchmarks/{script}", *shown])


def versions_in(python: Path | str, *packages: str) -> dict[str, str]:
    """Versions of packages in another environment; what is not there is left out."""
    code = "import sys, json\nfrom importlib.metadata import version, PackageNotFoundError\nfound = {}\n"
    code += "for name in sys.argv[1:]:\n  try: found[name] = version(name)\n  except PackageNotFoundError: pass\n"
    code += "print(json.dumps(found))"
    done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def run(command: list[str], **environment: str) -> str:
    """Run a command to its end and return what it printed; the compiler's cache starts empty each time.

    Raises:
        SystemExit: it failed; the end of what it said.
    """
    with tempfile.TemporaryDirectory() as compiled:
        paths = {"TORCHINDUCTOR_CACHE_DIR": compiled, "PYTHONPATH": str(HERE.parent)}
        env = {**os.environ, "HF_HUB_OFFLINE": "1", **paths, **environment}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def without_compiling() -> None:
    """Let torch.compile do nothing in all processes started from here: it alone takes a minute, which is no try-out."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"


def last_json(text: str) -> dict[str, Any]:
    """What a measuring process prints last."""
    row: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return row


def inner(*more: str) -> dict[str, Any]:
    """This script again in a fresh process, with the same arguments and these; what it prints last."""
    return last_json(run([sys.executable, sys.argv[0], *sys.argv[1:], *more]))


def place(args: argparse.Namespace, name: str) -> Path | None:
    """Where a record goes: what `--out` says, else among the results, unless nothing was measured but the script."""
    out: Path | None = args.out
    return HERE / f"results/{name}.jsonl" if out is None and not args.tiny else out


def write(path: Path | None, benchmark: str, script: str, **fields: Any) -> None:
    """Append one record with its date, command and machine; without a path, print it."""
    record = {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": " ".join([f"python benchmarks/{script}", *(shlex.quote(word) for word in sys.argv[1:])]),
        "machine": machine(),
        **fields,
    }
    if path is None:
        print(json.dumps(record))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
