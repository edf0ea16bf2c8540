"""Rows of results: each is written as soon as it is known, and one that was dropped or stopped says so."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "tokenizers", "torchao", "liger_kernel", "numpy")
_CHILDREN: list[subprocess.Popen[str]] = []
"""What this process started; it may hold the device."""


@dataclass(frozen=True)
class Row:
    """One line of results: what it is, and how it is found."""

    about: dict[str, Any]
    find: Callable[[], dict[str, Any]]
    seconds: float = 0.0
    """How long that takes, by guess. Where less time is left it is not begun."""
    left_out: str = ""
    """Why it cannot be found here, if so."""


def run_rows(args: argparse.Namespace, stage: str, rows: list[Row]) -> None:
    """Find one row after the other until the stage's time is over; a row that fails does not lose the others."""
    waiting, turn = deque(rows), threading.RLock()

    def stop(*_: Any) -> None:
        with turn:  # held to the end: what the main thread still finds is too late
            for child in _CHILDREN:
                with contextlib.suppress(OSError):
                    os.killpg(child.pid, signal.SIGKILL)
            for number, row in enumerate(waiting):
                said = {"left_out": "no time was left"} if number else {"error": "stopped: the stage's time was over"}
                write(args, stage, **row.about, **said)
            os._exit(1)

    # By a thread, which is heard while the main one waits for the device; the signal is gpu.sh's, in case it is not.
    plain = signal.signal(signal.SIGTERM, stop)
    left = args.deadline - time.time()
    timer = threading.Timer(max(0.0, left) if math.isfinite(left) else threading.TIMEOUT_MAX, stop)
    timer.daemon = True
    timer.start()
    try:
        while waiting:
            found = _found(args, waiting[0])
            with turn:
                write(args, stage, **waiting.popleft().about, **found)
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, plain)


def _found(args: argparse.Namespace, row: Row) -> dict[str, Any]:
    if row.left_out or time.time() + row.seconds > args.deadline:
        return {"left_out": row.left_out or "no time was left"}
    try:
        return row.find()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def output_of(command: list[str], env: Mapping[str, str] | None = None) -> str:
    """What a process prints; it ends with this one, so that it does not hold the device when a stage is stopped.

    Raises:
        RuntimeError: it failed.
    """
    pipe = subprocess.PIPE
    running = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True)
    _CHILDREN.append(running)
    out, said = running.communicate()
    _CHILDREN.remove(running)
    if running.returncode:
        raise RuntimeError(f"status {running.returncode}: {said[-1500:]}")
    return out


def beside(command: list[str], out: Any, env: Mapping[str, str]) -> subprocess.Popen[str]:
    """A process that runs beside this one, and ends with it; `out`: a file for what it prints."""
    running = subprocess.Popen(
        command, stdout=out, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )
    _CHILDREN.append(running)
    return running


def device_name(device: str) -> str:
    """What CUDA calls the card."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def machine(device: str) -> dict[str, Any]:
    """What the numbers were taken on."""
    found: dict[str, Any] = {"device": device_name(device), "cores": os.cpu_count(), "cpu": platform.machine()}
    if device == "cuda":
        found["cuda"] = torch.version.cuda
        found["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    found["python"] = platform.python_version()
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(args: argparse.Namespace, stage: str, **fields: Any) -> None:
    """Append one row, and show it."""
    row = {
        "benchmark": f"gpu, {stage}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "run": os.environ.get("LMSSL_GPU_RUN", ""),
        "tiny": args.tiny,
        "machine": machine(args.device),
        **fields,
    }
    args.num_errors += "error" in fields or not fields.get("good", True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"gpu-{stage}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shown = {name: value for name, value in fields.items() if not name.endswith("formula")}
    print(f"{stage}: {json.dumps(shown)[:600]}", flush=True)


def finish(args: argparse.Namespace) -> None:
    """End the stage; with status 1 where a row failed."""
    sys.exit(1 if args.num_errors else 0)
