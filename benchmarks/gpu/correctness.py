"""Correctness on the device, before any speed: tests marked `gpu`, parity with fp32 on CPU, leaks between documents.

    python benchmarks/gpu/correctness.py --out FOLDER --scratch FOLDER [--device cpu --tiny]

Parity: loss and gradients of one micro-batch of packed text, in bf16 on the device, plain and compiled by layers,
against float32 on CPU by masks. Leaks: every document of a batch is changed in turn, and no output of another may
change by a bit; for the kernels for rows of many lengths, torch's attention with a mask, and flex attention.
Tests run beside all else, until the stage ends at the latest, and their row is written in any case.
The process ends with status 1 if anything is out of tolerance.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import Row, beside, finish, run_rows
from setting import parse, recipe, release
from torch import Tensor
from torch.nn import functional as F

from lmssl.model.varlen import document_starts, varlen_attention
from lmssl.objective.module import LossModule
from lmssl.train.lock import RunLock
from lmssl.train.opening import open_session

LOSS_TOLERANCE = 2e-3
"""Of the loss, relative: bf16 has 8 bits, and thousands of targets average their rounding."""
GRADIENT_TOLERANCE = 0.05
"""Norm of the difference / norm, for each weight whose gradient is no rounding itself."""
NOISE_RATIO = 2e-3
TEST_FILES = (
    "tests/model/test_varlen.py",
    "tests/model/test_head_gpu.py",
    "tests/train/test_phases.py",
    "tests/train/test_precision.py",
    "tests/numerics/test_gpu.py",
)
LAST_SECONDS = 6.0
"""Of the stage, in which what the tests said is read."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key, value [B, H, T, D]."""
Way = Callable[[Tensor, bool], Attend]
"""Segments [B, T], whether causal: what attends so."""


def parity(args: argparse.Namespace, model: str, compile_: str) -> dict[str, Any]:
    """How far loss and gradients on the device are from those of float32 on CPU."""
    release()
    length = 128 if args.tiny else 1024
    asked = recipe(
        args,
        "parity",
        model,
        length=length,
        micro_sequences=2,
        steps=2,
        train={"compile": compile_, "precision": "bf16"},
    )
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    if not args.tiny:  # wide enough for the kernels, small enough for a CPU in float32
        asked = asked.model_copy(update={"model": asked.model.model_copy(update=shape)})
    lock = RunLock(Path(asked.out_path))
    session = open_session(asked, lambda _: None, lock=lock)
    try:
        batches = session.batches()
        micro = next(batches)[0]
        batches.close()  # type: ignore[attr-defined]
        term = next(iter(session.objective.weights))  # type: ignore[union-attr]
        device = session.accelerator.device
        here = session.core(micro.on(device))[term] / micro.counts[term]
        here.backward()
        found = {name: p.grad.float().cpu() for name, p in session.core.model.named_parameters()}
        plain = LossModule(session.core.model.cpu(), session.objective, bf16=False)
        for parameter in plain.parameters():
            parameter.grad = None
        with torch.compiler.set_stance("force_eager"):
            there = plain(micro.on(torch.device("cpu")))[term] / micro.counts[term]
            there.backward()
    finally:
        session.saver.close()
        lock.release()
    wanted = {name: p.grad for name, p in plain.model.named_parameters()}
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    ratios = {
        name: float((found[name] - gradient).norm() / (gradient.norm() + NOISE_RATIO / GRADIENT_TOLERANCE * whole))
        for name, gradient in wanted.items()
    }
    worst = max(ratios, key=ratios.__getitem__)
    total = torch.stack([(found[name] - gradient).norm() for name, gradient in wanted.items()]).norm() / whole
    loss = abs(here.item() - there.item()) / there.item()
    return {
        "loss": there.item(),
        "loss_difference": loss,
        "gradient_difference": float(total),
        "worst": [worst, ratios[worst]],
        "tolerances": [LOSS_TOLERANCE, GRADIENT_TOLERANCE],
        "good": loss <= LOSS_TOLERANCE and ratios[worst] <= GRADIENT_TOLERANCE,
    }


def by_mask(segments: Tensor, causal: bool) -> Attend:
    """Torch's attention with a matrix of what is seen."""
    mask = seen(segments, causal)
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, mask)


def by_starts(segments: Tensor, causal: bool) -> Attend:
    """The kernels for rows of many lengths, as training calls them."""
    starts = document_starts(segments.cpu()).to(segments.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen_attention(query, key, value, starts, causal, query.shape[-1] ** -0.5, 0).transpose(1, 2)

    return attend


def by_flex(segments: Tensor, causal: bool) -> Attend:
    """Torch's flex attention, compiled, with a mask of blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def may_see(row: Tensor, _: Tensor, asks: Tensor, asked: Tensor) -> Tensor:
        same = segments[row, asks] == segments[row, asked]
        return same & (asks >= asked) if causal else same

    length = segments.shape[1]
    mask = create_block_mask(may_see, len(segments), None, length, length, device=str(segments.device))
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: compiled(query, key, value, block_mask=mask)


BACKENDS: dict[str, Way] = {"varlen": by_starts, "sdpa with a mask": by_mask, "flex": by_flex}


def seen(segments: Tensor, causal: bool) -> Tensor:
    """[B, 1, T, T]."""
    same = segments[:, :, None] == segments[:, None, :]
    return (same.tril() if causal else same)[:, None]


def leaks(args: argparse.Namespace, name: str, way: Way, causal: bool) -> dict[str, Any]:
    """Whether another document's change is seen, and how far outputs and gradients are from exact ones."""
    device, length = torch.device(args.device), 128 if args.tiny else 2048
    generator = torch.Generator().manual_seed(0)
    cuts = torch.rand(2, length, generator=generator) < 8 / length
    segments = (cuts.cumsum(1) + 1).to(torch.int32).to(device)
    tensors = [torch.randn(2, 4, length, 64, generator=generator).bfloat16().to(device) for _ in range(3)]
    given = [tensor.clone().requires_grad_() for tensor in tensors]
    attend = way(segments, causal)
    out = attend(*given)
    grads = torch.autograd.grad(out.float().square().sum(), given)
    exact_given = [tensor.double().requires_grad_() for tensor in tensors]
    exact = by_mask(segments, causal)(*exact_given)
    exact_grads = torch.autograd.grad(exact.square().sum(), exact_given)
    differences = [
        float(((got.double() - want).norm() / want.norm()).detach())
        for got, want in zip((out, *grads), (exact, *exact_grads), strict=True)
    ]
    num_leaks = 0
    for number in range(1, int(segments.max()) + 1):
        chosen = (segments == number)[:, None, :, None]
        changed = [torch.where(chosen, tensor + 1, tensor) for tensor in tensors]
        with torch.no_grad():
            moved = attend(*changed)
        elsewhere = ~chosen.expand_as(moved)
        num_leaks += not torch.equal(moved[elsewhere], out.detach()[elsewhere])
    return {
        "backend": name,
        "documents": int(segments.max()),
        "num_leaks": num_leaks,
        "differences": dict(zip(("out", "query", "key", "value"), differences, strict=True)),
        "good": num_leaks == 0 and max(differences) < 0.02,
    }


def tests(args: argparse.Namespace) -> tuple[subprocess.Popen[str], Path]:
    """The tests that need a device, beside all else, for nothing is timed here; and the file of what they say."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider", "-rfE"]
    command += ["--continue-on-collection-errors"]
    command += ["-o", "filterwarnings=default", *TEST_FILES]  # other versions warn of other things
    said: Path = args.scratch / "pytest.log"
    said.parent.mkdir(parents=True, exist_ok=True)
    # cuBLAS asks for this once a process, so that a test cannot set it after another has multiplied.
    with said.open("w", encoding="utf-8") as file:  # a pipe that nobody reads would stop them when it is full
        return beside(command, file, {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}), said


def results(args: argparse.Namespace, running: subprocess.Popen[str], said: Path) -> dict[str, Any]:
    """What they found, if only in part; skipped ones are counted."""
    left = max(0.1, args.deadline - LAST_SECONDS - time.time())
    late = False
    try:
        running.wait(left if math.isfinite(left) else None)
    except subprocess.TimeoutExpired:
        late = True
        running.kill()
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    print("\n".join(lines[-60:]), flush=True)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR")) or (late and " FAILED" in line)]
    summary = lines[-1] if lines else ""
    if late:
        num_passed = sum(" PASSED" in line for line in lines)
        summary = f"stopped, no time was left: {num_passed} passed, {len(failed)} failed; at {summary}"
    return {"summary": summary, "failed": failed[:50], "good": running.returncode == 0 and not late}


def planned(args: argparse.Namespace) -> list[Row]:
    """Leaks and parity of what training uses, then of the other ways, then the tests, which began before."""
    running, said = tests(args)

    def leak(name: str, causal: bool, seconds: float) -> Row:
        find = partial(leaks, args, name, BACKENDS[name], causal)
        return Row({"what": f"leaks, {name}", "causal": causal}, find, seconds)

    # Torch has these, or their gradients, for CUDA only.
    names = [name for name in BACKENDS if args.device == "cuda" or name not in ("varlen", "flex")]
    rows = [leak(name, causal, 4) for name in names if name != "flex" for causal in (True, False)]
    for model, compile_ in (("124M", "layers"), ("ModernBERT-base", "layers"), ("350M", "layers"), ("124M", "off")):
        rows.append(Row({"what": f"parity, {model}, {compile_}"}, partial(parity, args, model, compile_), 15))
    rows += [leak(name, causal, 15) for name in names if name == "flex" for causal in (True, False)]
    return [*rows, Row({"what": "tests"}, partial(results, args, running, said))]


def main() -> None:
    """All of it; a row at once."""
    args = parse(__doc__)
    run_rows(args, "correctness", planned(args))
    print(f"correctness: {args.num_errors} rows are wrong" if args.num_errors else "correctness: all is well")
    finish(args)


if __name__ == "__main__":
    main()
