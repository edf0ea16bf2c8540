"""Scripts of `benchmarks` start: hours of measuring are no place to meet a name that has changed."""

from __future__ import annotations

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
        if script == "bench_loop":  # whose words are a recipe's
            continue
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
