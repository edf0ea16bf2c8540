"""Where a step's time goes: its kernels by time, the share in which none runs, and attention's kernels side by side.

python benchmarks/gpu/kernel_times.py --out FOLDER --scratch FOLDER [--device cpu --tiny]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from correctness import BACKENDS, Attend, Way, by_starts, seen
from rows import Row, finish, run_rows
from setting import Clock, drive, parse, recipe
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.nn.attention import varlen as torch_varlen
from torch.profiler import ProfilerActivity, profile

from lmssl.model import head

TOP = 40
CUDNN = "varlen by cuDNN"


def profiled(args: argparse.Namespace, model: str, length: int, micro_tokens: int) -> dict[str, Any]:
    """The kernels of two steps after warm-up."""
    length, rows = (128, 2) if args.tiny else (length, micro_tokens // length)
    asked = recipe(args, "kernels", model, length=length, micro_sequences=rows, steps=8)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if args.device == "cuda" else [])
    traced = profile(activities=kinds)

    def around(number: int, step: Callable[[], None]) -> None:
        if number == 5:
            _finish(args)
            traced.start()
        step()
        if number == 6:
            _finish(args)
            traced.stop()

    found = drive(asked, args.device, steps=8, around=around)
    on_device = DeviceType.CUDA if args.device == "cuda" else DeviceType.CPU
    # Ranges that torch names (Optimizer.step, a compiled region) lie on the device's line, too, around their kernels.
    events = [event for event in traced.events() if event.device_type == on_device and not event.is_user_annotation]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    by_name: dict[str, tuple[float, int]] = {}
    for event in events:
        spent, count = by_name.get(event.name, (0.0, 0))
        by_name[event.name] = spent + event.time_range.elapsed_us() / 1e6, count + 1
    whole = (spans[-1][1] - spans[0][0]) / 1e6
    busy = _covered(spans) / 1e6
    top = sorted(by_name.items(), key=lambda item: -item[1][0])[:TOP]
    return {
        "seconds_of_two_steps": whole,
        "idle_ratio": 1 - busy / whole,
        "tokens_per_step": found.tokens_per_step,
        "top": [
            {"name": name[:160], "seconds": spent, "calls": count, "ratio": spent / whole}
            for name, (spent, count) in top
        ],
    }


def _covered(spans: list[tuple[float, float]]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _finish(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def dense(_: Tensor, causal: bool) -> Attend:
    """Attention that knows no documents: what a sequence that is one document costs at best."""
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, is_causal=causal)


@contextmanager
def cudnn(wanted: bool) -> Iterator[None]:
    """Let torch's `varlen_attn` call cuDNN, which it can and does not."""
    plain = torch_varlen._should_use_cudnn
    if wanted:
        torch_varlen._should_use_cudnn = lambda _: True  # type: ignore[assignment]
    try:
        yield
    finally:
        torch_varlen._should_use_cudnn = plain


def attention(args: argparse.Namespace, way: Way, width: int, mean_tokens: int) -> dict[str, Any]:
    """Forward and backward of one layer."""
    length, rows, heads = (128, 2, 2) if args.tiny else (2048, 16, 768 // width)
    generator = torch.Generator().manual_seed(0)
    cuts = torch.rand(rows, length, generator=generator) < 1 / mean_tokens
    segments = (cuts.cumsum(1) + 1).to(torch.int32).to(args.device)
    shape = (rows, heads, length, width)
    given = [torch.randn(shape, generator=generator).bfloat16().to(args.device).requires_grad_() for _ in range(3)]
    gradient = torch.randn(shape, generator=generator).bfloat16().to(args.device)
    attend = way(segments, True)
    forward, both = Clock(args.device), Clock(args.device)
    for number in range(3 if args.tiny else 13):
        forward.marks = forward.marks if number > 2 else []
        both.marks = both.marks if number > 2 else []
        both.mark()
        forward.mark()
        out = attend(*given)
        forward.mark()
        torch.autograd.grad(out, given, gradient)
        both.mark()
    pairs = float(seen(segments, True).sum()) * heads
    seconds = [statistics.median(clock.seconds()[::2]) for clock in (forward, both)]
    return {
        "forward_seconds": seconds[0],
        "seconds": seconds[1],
        "useful_tflops": 14 * pairs * width / seconds[1] / 1e12,  # 4 forward and 10 backward a pair, with recomputation
        "heads": heads,
    }


def seconds_of(args: argparse.Namespace, call: Callable[[], Any], times: int = 8) -> float:
    """Median of some calls after three that are not counted."""
    clock = Clock(args.device)
    for number in range(1 if args.tiny else 3 + times):
        clock.marks = clock.marks if number > 2 else []
        clock.mark()
        call()
        clock.mark()
    return statistics.median(clock.seconds()[::2])


def products(args: argparse.Namespace, tokens: int, width: int, out: int) -> dict[str, Any]:
    """TFLOP/s of a linear layer's three products, and of the last one summed in float32."""
    tokens = 128 if args.tiny else tokens
    x, w, g = (
        torch.randn(shape, device=args.device, dtype=torch.bfloat16)
        for shape in ((tokens, width), (out, width), (tokens, out))
    )
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: x @ w.t(),
        "input": lambda: g @ w,
        "weight": lambda: g.t() @ x,
    }
    if args.device == "cuda":
        total = torch.zeros(out, width, device=args.device)
        calls["weight in float32"] = lambda: torch.addmm(total, g.t(), x, out_dtype=torch.float32, out=total)
    flops = 2 * tokens * width * out
    return {"tflops": {name: flops / seconds_of(args, call) / 1e12 for name, call in calls.items()}}


def head_seconds(args: argparse.Namespace, width: int, chunk_targets: int) -> dict[str, Any]:
    """Loss and gradients of the head at 65,536 targets, by the size of a chunk."""
    targets, vocabulary = (256, 1000) if args.tiny else (65536, 50304)
    hidden = torch.randn(targets, width, device=args.device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, device=args.device) * 0.02).requires_grad_()
    ids = torch.randint(vocabulary, (targets,), device=args.device)

    def call() -> None:
        hidden.grad = weight.grad = None
        head.summed_cross_entropy(hidden, weight, ids, chunk_targets=chunk_targets).backward()

    seconds = seconds_of(args, call, 3)
    return {"seconds": seconds, "tflops": {"three products": 6 * targets * width * vocabulary / seconds / 1e12}}


def ceilings(args: argparse.Namespace) -> list[Row]:
    """What products alone reach at the models' shapes, and the head by the size of its chunks."""
    rows = []
    for tokens, width, outs in (
        (131072, 768, (768, 2304, 2048, 4096)),
        (65536, 1024, (1024, 3072, 2816, 5632)),
        (8192, 768, (50304,)),
    ):
        for out in outs:
            about = {"what": f"products, {tokens} x {width} x {out}"}
            rows.append(Row(about, partial(products, args, tokens, width, out), 1))
    for chunk in (1024, 2048, 4096, 8192, 16384):
        rows.append(Row({"what": f"head, chunks of {chunk}"}, partial(head_seconds, args, 768, chunk), 3))
    return rows[:1] + rows[-1:] if args.tiny else rows


def planned(args: argparse.Namespace) -> list[Row]:
    """A profile of each model, and attention by way, width and length of documents."""
    ways = {**BACKENDS, CUDNN: by_starts, "one document, torch's choice": dense}
    if args.device == "cpu":
        ways = {name: way for name, way in ways.items() if "varlen" not in name and name != "flex"}

    def step(model: str, length: int, micro_tokens: int, seconds: float) -> Row:
        return Row({"what": f"step, {model}, {length}"}, partial(profiled, args, model, length, micro_tokens), seconds)

    def layers(width: int, mean_tokens: int) -> list[Row]:
        def find(name: str, way: Way) -> dict[str, Any]:
            with cudnn(name == CUDNN):
                return attention(args, way, width, mean_tokens)

        shape = {"head_width": width, "mean_document_tokens": mean_tokens}
        return [
            Row({"what": f"attention, {name}", **shape}, partial(find, name, way), 12 if name == "flex" else 3)
            for name, way in ways.items()
        ]

    # With the micro-batches of mfu.py, whose compiled layers are found again.
    rows = [step("124M", 2048, 131072, 15), *layers(64, 1000), step("ModernBERT-base", 1024, 131072, 15)]
    if not args.tiny:
        rows += [step("350M", 2048, 65536, 15), step("1.3B", 2048, 32768, 20)]
    return [*rows, *ceilings(args), *layers(128, 1000), *layers(64, 100)]


def main() -> None:
    """All rows that there is time for."""
    args = parse(__doc__)
    run_rows(args, "kernels", planned(args))
    finish(args)


if __name__ == "__main__":
    main()
