"""Document attention on CPU by the length of sequences: by products, by torch's kernel, by a loop, and by our kernel.

    python benchmarks/bench_attention.py [--lengths 512 1024 2048] [--tokens 4096] [--tiny]

One layer's attention, forward and backward, on so many tokens of documents of log-normal lengths. The ways are those
that `model/attention.py` chooses from: compiled products under a mask, torch's kernel under the same mask (where
nothing is compiled), documents one by one, and tiles in a kernel of our own. They take turns in one process, A B C A B
C. Results are appended to benchmarks/results/attention.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import place, write
from torch import Tensor
from torch.nn import functional as F

from lmssl.model import kernels, native
from lmssl.model.attention import _document_mask, _loop, loop_from_tokens
from lmssl.model.products import products_attention
from lmssl.train.launch import keep_memory

SIGMA = 1.0
"""Of the logarithm of documents' lengths."""


def segments_of(rows: int, length: int, mean: float) -> Tensor:
    """[rows, length]: documents of log-normal lengths, the last of a row cut."""
    random = np.random.default_rng(0)
    found = np.zeros((rows, length), dtype=np.int64)
    for row in found:
        start, number = 0, 1
        while start < length:
            size = max(1, int(random.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA)))
            row[start : start + size] = number
            start, number = start + size, number + 1
    return torch.from_numpy(found)


def ways(segments: Tensor, head: int, causal: bool) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """All of them, on queries, keys and values."""
    mask, scale = _document_mask(segments, causal), head**-0.5
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "products": lambda q, k, v: products_attention(q, k, v, mask, causal=causal, scale=scale),
        "kernel, mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, scale=scale),
        "loop": lambda q, k, v: _loop(q, k, v, segments, causal, scale, 0)[0],
    }
    if native.in_use():
        found["tiles"] = lambda q, k, v: kernels.attention(q, k, v, segments, causal, scale, 0)[0]
    return found


def measure(length: int, mean: float, causal: bool, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each way, forward and backward."""
    torch._dynamo.reset()  # it compiles for eight shapes at most, and then no longer
    rows = max(1, args.tokens // length)
    segments, dtype = segments_of(rows, length, mean), getattr(torch, args.dtype)
    shape = (rows, args.heads, length, args.head)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    grad = torch.randn(shape).to(dtype)
    found: dict[str, list[float]] = {}
    for repeat in range(args.repeats + 2):
        for name, way in ways(segments, args.head, causal).items():
            started = time.perf_counter()
            torch.autograd.grad(way(*inputs), inputs, grad)
            if repeat >= 2:
                found.setdefault(name, []).append(time.perf_counter() - started)
    return found


def from_tokens(dtype: str) -> int:
    """From which length on runs in this type loop over documents."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        return loop_from_tokens()


def main() -> None:
    """Measure every length and append the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 1536, 2048, 4096])
    parser.add_argument("--means", type=float, nargs="+", default=[250.0, 1000.0], help="tokens of a document")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="to try the script")
    parser.add_argument("--out", type=Path, help="default: the results; with --tiny the record is printed")
    args = parser.parse_args()
    if args.tiny:
        args.lengths, args.means, args.tokens, args.repeats = [128], [50.0], 256, 2
    keep_memory()
    if native.processor_can(getattr(torch, args.dtype)):
        native.load()
    rows: list[dict[str, Any]] = []
    for causal in (True, False):
        for mean in args.means:
            for length in args.lengths:
                found = measure(length, mean, causal, args)
                rows.append({"causal": causal, "mean": mean, "length": length, "seconds": found})
                said = "  ".join(f"{name} {statistics.median(took) * 1e3:.1f} ms" for name, took in found.items())
                kind = "causal" if causal else "both ways"
                print(f"{kind}, documents of {mean:g}, rows of {length}: {said}", flush=True)
    write(
        place(args, "attention"),
        "attention",
        "bench_attention.py",
        loop_from_tokens=from_tokens(args.dtype),
        dtype=args.dtype,
        tokens=args.tokens,
        heads=args.heads,
        head=args.head,
        rows=rows,
    )


if __name__ == "__main__":
    main()
