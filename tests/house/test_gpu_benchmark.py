"""What gpu.sh promises of its time: the whole is bounded, required rows fit, and no row is lost without a word."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

Load = Callable[[str], ModuleType]
START_SECONDS = 12
"""Of a stage, before its first row: imports, by guess."""


@pytest.fixture
def load(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a script; its neighbours' names are gone afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(root / "benchmarks")
    monkeypatch.syspath_prepend(root / "benchmarks/gpu")
    yield import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(root / "benchmarks")):
            del sys.modules[name]


def arguments(out: Path, until: float) -> Namespace:
    return Namespace(device="cpu", tiny=True, out=out, deadline=until, num_errors=0)


def written(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "gpu-test.jsonl").read_text(encoding="utf-8").splitlines()]


def test_stages_keep_what_their_required_rows_take(load: Load, root: Path) -> None:
    script = (root / "benchmarks/gpu.sh").read_text(encoding="utf-8")
    kept = {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", script)}
    whole = int(re.search(r"seconds=(\d+) stages=", script)[1])  # type: ignore[index]
    assert sum(kept.values()) <= whole - 60, "prepare"
    assert whole <= 580
    sets, peers = load("mfu").SETS, load("peers")
    required = {
        "mfu": [row.seconds for row in sets["required"][:3]],
        "fp8": [row.seconds for row in sets["fp8"]],
        "peers": [peers.OUR_SECONDS, *[peers.Entrant("").seconds] * 2],
        "memory": [load("memory").ROW_SECONDS] * 2,
        "kernel_times": [15.0, 3.0],
    }
    for stage, seconds in required.items():
        assert START_SECONDS + sum(seconds) <= kept[stage], stage


def test_rows_are_found_or_say_why_not(load: Load, tmp_path: Path) -> None:
    rows, args = load("rows"), arguments(tmp_path, time.time() + 100)

    def fails() -> dict[str, Any]:
        raise RuntimeError("no")

    made = [
        rows.Row({"name": "good"}, lambda: {"value": 1}),
        rows.Row({"name": "fails"}, fails),
        rows.Row({"name": "long"}, lambda: {"value": 2}, 200),
        rows.Row({"name": "elsewhere"}, lambda: {"value": 3}, 1, "not here"),
        rows.Row({"name": "short"}, lambda: {"value": 4}, 1),
    ]
    rows.run_rows(args, "test", made)
    found = {
        row["name"]: {k: row.get(k) for k in ("value", "error", "left_out") if k in row} for row in written(tmp_path)
    }
    assert found == {
        "good": {"value": 1},
        "fails": {"error": "RuntimeError: no"},
        "long": {"left_out": "no time was left"},
        "elsewhere": {"left_out": "not here"},
        "short": {"value": 4},
    }
    assert args.num_errors == 1


STOPPED = """
import sys, time
from argparse import Namespace
from pathlib import Path
from rows import Row, output_of, run_rows
args = Namespace(device="cpu", tiny=True, out=Path(sys.argv[1]), deadline=time.time() + 1.5, num_errors=0)
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
rows = [Row({"name": "a"}, dict), Row({"name": "b"}, lambda: output_of(sleep)), Row({"name": "c"}, dict)]
run_rows(args, "test", rows)
"""


def test_a_stage_ends_in_time_and_writes_what_it_was_at(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED, str(tmp_path)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=root / "benchmarks/gpu", capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1 and time.monotonic() - began < 45, done.stderr
    said = [(row["name"], row.get("error") or row.get("left_out")) for row in written(tmp_path)]
    assert said == [("a", None), ("b", "stopped: the stage's time was over"), ("c", "no time was left")]


def test_documents_are_counted_by_their_tokens(load: Load) -> None:
    setting = load("setting")
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.int32)
    micro = setting.MicroBatch({"segments_BT": segments}, {}, 0.0, 0)
    assert setting.document_lengths([micro, micro]) == [2, 3, 6, 2, 3, 6]


def test_every_table_takes_rows_that_are_missing(load: Load) -> None:
    """Of a call that had no time for most."""
    machine = {"device": "a card", "python": "3.12"}
    base = {"tiny": False, "machine": machine, "date": "today"}
    late = {**base, "left_out": "no time was left"}
    good = {"beyond_bytes": 2e9}
    shape = {"model": "124M", "compile": "layers"}
    mfu = {"name": "124M, 2048", "formula": "F", "documents_formula": "D", "peak_flops": 1e15}
    earlier = {**base, **shape, "vocabulary": 131072, "beyond_bytes": 2.2e9}
    assert load("gpu_tables").newest([earlier, {**late, **shape, "vocabulary": 131072}]) == [earlier]
    stages = {
        "correctness": [{**late, "what": "parity"}, {**base, "what": "tests", "good": True, "summary": "3 passed"}],
        "mfu": [{**late, **mfu}],
        "peers": [{**late, "name": "lmssl", "round": 1, "rows": 16, "sequence_length": 2048}],
        "memory": [
            {**base, **shape, **good, "vocabulary": 1024},
            earlier,
            {**base, "model": "350M", "compile": "off", **good, "vocabulary": 1024},
            {**late, "model": "350M", "compile": "off", "vocabulary": 131072},
        ],
        "kernels": [{**late, "what": "attention, flex", "head_width": 64, "mean_document_tokens": 100}],
    }
    said = "\n".join(load("gpu_tables").tables(stages))
    assert "| 124M, layers | 2.00 | 2.20 | 1.10 |" in said
    assert "| 350M, off | 2.00 | no time was left |  |" in said
    assert "| parity | not tried: no time was left |" in said and "| tests | right: 3 passed |" in said
    assert "| attention, flex | 64 | 100 | no time was left | | |" in said
