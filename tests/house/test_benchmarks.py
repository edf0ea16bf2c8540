"""Scripts of `benchmarks` start: hours of measuring are no place to meet a name that has changed."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a script; its neighbours' names are gone afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(root / "benchmarks")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "")  # as it was before, after --tiny
    yield import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(root / "benchmarks")):
            del sys.modules[name]


def test_every_command_line_is_read(load: Load, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = sorted(path.stem for path in (root / "benchmarks").glob("bench_*.py"))
    assert "bench_head" in scripts
    for script in scripts:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as done:
            load(script).main()
        assert done.value.code == 0, script


def test_heads_are_measured_and_tell_the_same_loss(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = load("bench_head")
    args = head.parse(["--tiny"])
    assert head.place(args, "head") is None  # no record
    monkeypatch.setattr(head, "keep_memory", lambda: None)
    for slow in ("load_tokenizer", "surface_bytes"):
        monkeypatch.setattr(head, slow, cache(getattr(head, slow)))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    losses: list[float] = []
    for part in (head.WholeHead, head.LossModule):
        plain = part.forward

        def forward(*inputs: Any, plain: Any = plain) -> Any:
            found = plain(*inputs)
            losses.append(float(found["masked"].detach()))
            return found

        monkeypatch.setattr(part, "forward", forward)
    args.steps, args.precision = 3, "fp32"
    try:
        assert all(head.measure(name, args)["seconds"] > 0 for name in head.ENTRANTS)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert len(losses) == 9
    assert losses == pytest.approx([losses[0]] * 9, rel=1e-5)


def test_a_peer_gets_three_times_our_seconds(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where its steps become quicker than those of the trial."""
    quality, asked = load("bench_quality"), []
    monkeypatch.setattr(quality, "peers_python", lambda _: "python")

    def run(command: list[str]) -> str:
        asked.append(int(command[command.index("--steps") + 1]))
        seconds = [2.0] * 6 if len(asked) == 1 else [1.5] * asked[-1]
        return f'said before\n{{"step_seconds": {seconds}}}\n'

    monkeypatch.setattr(quality, "run", run)
    args = SimpleNamespace(length=8, rows=2)
    _, spent = quality.theirs(tmp_path, args, 300.0, 5e-5)
    assert spent >= 300 and asked[1] == 165 and len(asked) == 3
    assert quality.TIMES == 3


def test_rates_at_the_edge_of_a_grid_are_said(load: Load) -> None:
    """Also of records of before they held their grids; a best rate inside its grid needs no word."""
    report, machine = load("report"), load("record").machine()
    row = {"seed": 1, "adamw_loss": 5.0, "muon_loss": 4.9, "steps_ratio": 0.7, "step_seconds_ratio": 1.0}
    common = {"size": "10m", "steps": 400, "batch_tokens": 4096, "seeds": [row], "machine": machine, "date": "today"}
    common |= {"adamw": {"lr": 1e-3}, "muon": {"lr": 4e-3, "adamw_lr": 1e-3}}
    common |= {"command": "bench_optim.py --adamw 1e-3 2e-3 --muon 2e-3 4e-3 8e-3 --work WORK"}
    said = report.optim(common)
    assert "adamw's is at the edge of its grid (0.001, 0.002)" in said
    assert "muon's is at the edge" not in said
    said = report.optim(common | {"grids": {"adamw": [5e-4, 1e-3, 2e-3], "muon": [4e-3, 8e-3]}})
    assert "adamw's is at the edge" not in said
    assert "muon's is at the edge of its grid (0.004, 0.008)" in said


def test_recorded_runs_of_before_a_setting_are_found_again(load: Load) -> None:
    """By the command that made them, and by no other."""
    optim, made = load("bench_optim"), []
    first = json.loads((load("record").HERE / "results/optim.jsonl").read_text(encoding="utf-8").splitlines()[0])
    words = shlex.split(first["command"])[2:]
    words[words.index("CORPUS")] = first["corpus"]
    for more in ([], ["--validation-tokens", "50000"], ["--precision", "fp32"], ["--warmup-steps", "50"]):
        bench = optim.Bench(optim.parse([*words[:-2], *more]))
        bench.write = made.append
        key = {name: first[name] for name in ("optim", "seed", "tenths")}
        assert (bench._once(key, lambda: {"loss": 0.0})["loss"] == first["loss"]) == (not more)
    assert len(made) == 3


def test_the_share_of_the_loop_is_that_of_all_time(load: Load) -> None:
    report, machine = load("report"), load("record").machine()
    found = {"forward_and_backward": [90.0, 290.0], "loop overhead": [2.0, 6.0], "step": [100.0, 300.0]}
    fields = {"recipe": "r.yaml", "overrides": ["a=1"], "steps": 30, "line_steps": 5, "milliseconds": found}
    said = report.loop(fields | {"machine": machine, "date": "today", "command": "python x"})
    assert "| loop overhead | 4.00 (2.00-6.00) | 2.00% |" in said and "`r.yaml` a=1" in said
