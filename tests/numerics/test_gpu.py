"""A run on a GPU: the step of the CPU up to rounding, the same after a resume bit for bit, and no waiting in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lmssl import checkpoint
from lmssl.objective.module import LossModule
from lmssl.recipe.load import load_recipe
from lmssl.train.agree import Agreement
from lmssl.train.lock import RunLock
from lmssl.train.opening import open_session
from lmssl.train.phases import Phases
from lmssl.train.session import Session
from lmssl.train.step import Measured, train_step
from runs import assert_equal_runs, small_recipe, write_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model": {"kind": "llama", **SIZES}},
    "qwen3": {"model": {"kind": "qwen3", "num_key_value_heads": 1, "head_dim": 64, **SIZES}},
    "modernbert": {
        "tokenizer": {"path": "tokenizer/wordpiece-8k"},
        "objective": {"kind": "masked"},
        "model": {"kind": "modernbert", "local_attention": 16, **SIZES},
    },
}


@contextmanager
def opened(tmp_path: Path, text: Path, name: str, **changes: Any) -> Iterator[Session]:
    recipe = small_recipe(text, tmp_path / name, tmp_path / "cache", **changes)
    loaded = load_recipe(write_recipe(tmp_path / f"{name}.yaml", recipe))
    lock = RunLock(Path(loaded.recipe.out_path))
    session = open_session(loaded.recipe, lambda _: None, lock=lock)
    try:
        yield session
    finally:
        session.saver.close()
        session.backend.close()
        lock.release()


def steps(session: Session, count: int, *, from_step: int = 0) -> list[Measured]:
    """So many steps, of which none waits for the device from `from_step` on."""
    agreement, phases = Agreement(lambda: False, lambda: 0.0), Phases(session.accelerator.device)
    batches, found = session.batches(), []
    for step in range(count):
        micro_batches = next(batches)
        session.begin_step(micro_batches[0])
        torch.cuda.set_sync_debug_mode("error" if step >= from_step else "default")
        try:
            made = train_step(
                session.backend,
                session.objective,
                micro_batches,
                lr_ratio=1.0,
                max_grad_norm=1.0,
                seed=1,
                step=step,
                agreement=agreement,
                phases=phases,
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert made is not None
        made.wait()
        found.append(made)
    batches.close()  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits_for_the_device(tmp_path: Path, text_folder: Path, kind: str, optim: str) -> None:
    compile_ = "layers" if optim == "adamw" else "off"
    changes = {**KINDS[kind], "optim": {"kind": optim, "lr": 1e-3}, "train.compile": compile_}
    with opened(tmp_path, text_folder, "run", steps=6, **changes) as session:
        measured = steps(session, 5, from_step=3)
    assert all(made.loss.device.type == "cpu" and made.finite.item() == 1.0 for made in measured)


@pytest.mark.parametrize(("kind", "compile_"), [*((kind, "off") for kind in KINDS), ("llama", "model")])
def test_bf16_here_is_float32_on_the_cpu(tmp_path: Path, text_folder: Path, kind: str, compile_: str) -> None:
    with opened(tmp_path, text_folder, "run", **KINDS[kind], **{"train.compile": compile_}) as session:
        batches = session.batches()
        micro = next(batches)[0]
        batches.close()  # type: ignore[attr-defined]
        term = next(iter(session.objective.weights))  # type: ignore[union-attr]
        device = session.accelerator.device
        assert "document_starts" in micro.on(device)
        here = session.core(micro.on(device))[term] / micro.counts[term]
        here.backward()
        found = {name: p.grad.cpu() for name, p in session.core.model.named_parameters()}
        plain = LossModule(session.core.model.cpu(), session.objective, bf16=False)
        with torch.compiler.set_stance("force_eager"):
            for parameter in plain.parameters():
                parameter.grad = None
            there = plain(micro.on(torch.device("cpu")))[term] / micro.counts[term]
            there.backward()
    assert here.item() == pytest.approx(there.item(), rel=2e-3)
    wanted = {name: p.grad for name, p in plain.model.named_parameters()}
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 0.05 * gradient.norm() + 2e-3 * whole, name


def train_elsewhere(recipe: Path) -> None:
    """Train in a process of its own: cuBLAS reads its workspace's setting once, and other tests multiplied before."""
    command = [sys.executable, "-m", "lmssl", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, text_folder: Path) -> None:
    changes = {"train.deterministic": True, "checkpoint": {"every_steps": 3}, "train.compile": "layers"}
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=6, **changes)
    path, run = write_recipe(tmp_path / "run.yaml", recipe), tmp_path / "run"
    train_elsewhere(path)
    shutil.copytree(run, tmp_path / "whole")
    shutil.rmtree(checkpoint.step_folders(run)[-1])
    train_elsewhere(path)
    assert_equal_runs(run, tmp_path / "whole")
