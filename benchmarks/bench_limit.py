"""A training step against its own matrix products: how near it comes to a machine that does nothing else.

    python benchmarks/bench_limit.py [--objective causal|masked] [--repeats 3] [--tiny]

The products are written down while one step runs, compiled in bf16, uncompiled in float32, which multiplies the same
(and with --tiny): every multiplication in the step's precision with its shapes and strides, forward and both backward
ones, the head's at targets included, in the step's order. Then they are run alone, one after the other, on operands
that exist already, those of torch into results that exist already too. A second time torch makes them all, and a third
time each with operands laid out as is fastest for it. Attention's products are apart: where our kernel makes them,
those that it makes for the documents of the batch, at the rate of the other products; elsewhere they are timed
(causal: over four blocks of queries, as the compiled step has them). Limit and step are processes of their own, A B A
B. The share is seconds of all products / seconds of a step of `lmssl train`. Results are appended to
benchmarks/results/limit.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from entrants import MODELS, ours, prepare, recipe_of
from record import inner, place, without_compiling, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmssl.model import linear, native
from lmssl.model.attention import loop_from_tokens
from lmssl.model.products import _blocks
from lmssl.objective.base import MicroBatch, SumObjective
from lmssl.recipe.load import load_recipe
from lmssl.recipe.sections import Recipe
from lmssl.train.lock import RunLock
from lmssl.train.opening import open_session
from lmssl.train.precision import bf16_is_faster

TILE = {torch.bfloat16: 128, torch.float32: 64}
"""Queries, and keys, of a tile, as `lmssl/model/cpp/attention.cpp` has them."""

Operand = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides."""


class Product(NamedTuple):
    """One multiplication."""

    left: Operand
    right: Operand
    by_kernel: bool = False
    """Made by our kernel for gradients of weights, which turns the left side itself."""


class Products(TorchDispatchMode):
    """Writes down every product of a type that is made under it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weights: list[Product] = []
        self.attention: list[tuple[int, ...]] = []
        """Shapes of queries, one of each layer; empty where it is our kernel that attends."""
        self.segments: Tensor | None = None
        """Of the last micro-batch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = str(func)
        if kind.startswith("aten._scaled_dot_product") and "backward" not in kind:
            self.attention.append(tuple(args[0].shape))
        if kind == "lmssl.plus_product.default" and self.dtype == torch.float32:
            self.weights.append(Product(_operand(args[2].t()), _operand(args[1])))
        elif kind == "lmssl.plus_product.default":  # turns its left side first, and multiplies part by part
            self.weights.append(Product(_operand(args[1].t().contiguous()), _operand(args[2])))
        pair = args[:2] if kind == "aten.mm.default" else args[1:3] if kind == "aten.addmm.default" else ()
        if pair and pair[0].dtype == self.dtype:
            self.weights.append(Product(_operand(pair[0]), _operand(pair[1])))
        return func(*args, **(kwargs or {}))


def _operand(tensor: Tensor) -> Operand:
    return tuple(tensor.shape), tuple(tensor.stride())


@contextmanager
def compiled_products(dtype: torch.dtype) -> Iterator[list[Product]]:
    """Every product of a type that compiled code makes meanwhile."""
    from torch._inductor.select_algorithm import extern_kernels

    found: list[Product] = []

    def noted(multiply: Callable[..., Tensor], first: int) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            if args[first].dtype == dtype:
                found.append(Product(_operand(args[first]), _operand(args[first + 1])))
            return multiply(*args, **kwargs)

        return run

    def kernel(name: str, kind: torch.dtype) -> Callable[..., Any]:
        def run(grad: Any, hidden: Any, tokens: Any, outputs: Any, inputs: Any, *rest: Any) -> None:
            left, right = (outputs.value, tokens.value), (tokens.value, inputs.value)
            found.append(Product((left, (1, left[0])), (right, (right[1], 1)), by_kernel=True))
            native.kernel(name, kind)(grad, hidden, tokens, outputs, inputs, *rest)

        return run

    before = extern_kernels.mm, extern_kernels.addmm
    extern_kernels.mm, extern_kernels.addmm, linear.kernel = noted(torch.mm, 0), noted(torch.addmm, 1), kernel
    try:
        yield found
    finally:
        (extern_kernels.mm, extern_kernels.addmm), linear.kernel = before, native.kernel


def steps(recipe: Recipe) -> Products:
    """What is multiplied in a step of a recipe: the second, where it is compiled, for the first compiles."""
    lock = RunLock(Path(recipe.out_path))
    session = open_session(recipe, lambda text: print(text, file=sys.stderr), lock=lock)
    objective = session.objective
    assert isinstance(objective, SumObjective)
    products, compiled = Products(session.core.dtype), session.compiled != "off"

    def run(micros: list[MicroBatch]) -> None:
        for micro in micros:
            sums = session.core(dict(micro.inputs))
            torch.stack([sums[term] for term in objective.weights]).sum().backward()
            products.segments = micro.inputs["segments_BT"]

    with closing(session.batches()) as batches:
        if compiled:
            run(next(batches))
            with compiled_products(session.core.dtype) as products.weights:
                run(next(batches))
        else:
            with products:
                run(next(batches))
    session.saver.close()
    session.backend.close()
    lock.release()
    return products


def filled(operand: Operand, dtype: torch.dtype) -> Tensor:
    """An operand with numbers in it, as rows or as columns."""
    (rows, columns), (first, second) = operand
    if first == 1 and second > 1:
        return torch.randn(columns, rows).to(dtype).t()
    return torch.randn(rows, columns).to(dtype)


def calls(products: list[Product], dtype: torch.dtype) -> list[Callable[[], Any]]:
    """Each product on tensors of its own."""
    made = []
    for left, right, by_kernel in products:
        a, b = filled(left, dtype), filled(right, dtype)
        if by_kernel:
            made.append(lambda a=a, b=b: linear.weight_gradient(a.t(), b))
            continue
        out = torch.empty(left[0][0], right[0][1], dtype=dtype)
        made.append(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
    return made


def fastest(products: list[Product], times: int, dtype: torch.dtype) -> list[Product]:
    """The same products with each operand as rows or as columns, whichever pair is fastest for its shape."""
    chosen: dict[tuple[tuple[int, ...], tuple[int, ...]], Product] = {}
    for (left, _), (right, _), _ in products:
        if (left, right) in chosen:
            continue
        found = []
        for a in ((left, (left[1], 1)), (left, (1, left[0]))):
            for b in ((right, (right[1], 1)), (right, (1, right[0]))):
                found.append((seconds(calls([Product(a, b)], dtype), times), Product(a, b)))
        chosen[left, right] = min(found)[1]
    return [chosen[left[0], right[0]] for left, right, _ in products]


def scores(segments: Tensor, causal: bool, size: int) -> int:
    """Scores of queries and keys that the kernel makes for the documents of a batch, tile by tile of `size` squared.

    Of tiles of 64, those that our own product is for, only the rows and columns between which something is seen.
    """
    length, count = segments.shape[1], 0
    for row in segments:
        same = row[:, None] == row[None, :]
        seen = same & (torch.arange(length)[:, None] >= torch.arange(length)) if causal else same
        for queries in seen.split(size):
            for tile in queries.split(size, dim=1):
                if tile.any():
                    sides = [tile.any(dim).nonzero() for dim in (0, 1)]
                    spans = [int(side.max() - side.min()) + 1 for side in sides]
                    count += spans[0] * spans[1] if size == TILE[torch.float32] else size * size
    return count


def attention_flops(recipe: Recipe, segments: Tensor, causal: bool, size: int) -> float:
    """Two products forward and five backward, in all heads of all layers."""
    model = recipe.model
    layers, width = model.num_hidden_layers, model.hidden_size  # type: ignore[attr-defined]
    return 7 * 2.0 * width * layers * scores(segments, causal, size)


def attention_calls(shapes: list[tuple[int, ...]], causal: bool, dtype: torch.dtype) -> list[Callable[[], Any]]:
    """Two products forward and five backward (scores are made again), block by block."""
    made: list[Callable[[], Any]] = []
    for rows, heads, length, head in shapes:
        for start, end, seen in _blocks(length, length, causal):
            narrow, wide = (rows * heads, end - start, head), (rows * heads, seen, head)
            q, g, k, v = (torch.randn(s).to(dtype) for s in (narrow, narrow, wide, wide))
            p = torch.rand(rows * heads, end - start, seen).to(dtype)
            scores, of_q, of_k = torch.empty_like(p), torch.empty_like(q), torch.empty_like(k)
            for a, b, out in (
                *((q, k.transpose(1, 2), scores), (p, v, of_q)),
                *((q, k.transpose(1, 2), scores), (g, v.transpose(1, 2), scores), (p, k, of_q)),
                *((p.transpose(1, 2), q, of_k), (p.transpose(1, 2), g, of_k)),
            ):
                made.append(lambda a=a, b=b, out=out: torch.bmm(a, b, out=out))
    return made


def seconds(made: list[Callable[[], Any]], times: int) -> float:
    """Median of running all, after one run that is not counted."""
    found = []
    for _ in range(times + 1):
        started = time.perf_counter()
        for call in made:
            call()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def flops(products: list[Product]) -> float:
    """A multiplication and an addition for each pair."""
    return float(sum(2 * left[0] * left[1] * right[1] for (left, _), (right, _), _ in products))


def limit(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step's products."""
    with tempfile.TemporaryDirectory() as scratch:
        overrides = [f"out={scratch}/run", "data.workers=0"]
        if args.tiny or not bf16_is_faster("cpu"):
            overrides += ["train.compile=off", "train.kernels=on"]
        recipe = load_recipe(folder / "recipe-limit.yaml", overrides).recipe
        found = steps(recipe)
    products, dtype = found.weights, found.dtype
    causal = args.objective == "causal"
    row = {
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds(calls(products, dtype), args.times),
        "torch_seconds": seconds(calls([Product(left, right) for left, right, _ in products], dtype), args.times),
        "fastest_seconds": seconds(calls(fastest(products, args.times, dtype), dtype), args.times),
        "flops": flops(products),
        "num_products": len(products),
    }
    if native.in_use():
        assert found.segments is not None
        rate = row["flops"] / row["seconds"]
        return row | {"attention_seconds": attention_flops(recipe, found.segments, causal, TILE[dtype]) / rate}
    shapes = found.attention or [_queries(recipe, args)] * recipe.model.num_hidden_layers  # type: ignore[attr-defined]
    return row | {"attention_seconds": seconds(attention_calls(shapes, causal, dtype), args.times)}


def _queries(recipe: Recipe, args: argparse.Namespace) -> tuple[int, ...]:
    heads, width = recipe.model.num_attention_heads, recipe.model.hidden_size  # type: ignore[attr-defined]
    return args.rows, heads, args.length, width // heads


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=list(MODELS), default="causal")
    parser.add_argument("--size", choices=["mini", "small"], default="mini", help="of BERT")
    parser.add_argument("--rate", type=float, default=0.15, help="share of tokens masked")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--times", type=int, default=10, help="runs of all products")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="a model too small to mean anything, to try the script")
    parser.add_argument("--inner", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default: the results; with --tiny the record is printed")
    args = parser.parse_args()
    if args.length >= loop_from_tokens():
        parser.error(f"from {loop_from_tokens()} tokens on attention goes by documents, which this does not time")
    if args.tiny:
        without_compiling()
        args.repeats, args.times, args.steps, args.warmup, args.length, args.rows = 1, 2, 4, 2, 64, 4
    return args


def main() -> None:
    """Limit and step in turn, and the record."""
    args = parse()
    if args.inner:
        print(json.dumps(limit(args.inner, args)))
        return
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        section = prepare(folder, args)
        recipe = recipe_of(folder, section, args, "limit")
        (folder / "recipe-limit.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        for repeat in range(args.repeats):
            row = inner("--inner", str(folder))
            step = statistics.median(ours(folder, section, args, repeat)["step_seconds"][args.warmup :])
            whole = row["seconds"] + row["attention_seconds"]
            row |= {"step_seconds": step, "share": whole / step, "weights_share": row["seconds"] / step}
            row["fastest_share"] = (row["fastest_seconds"] + row["attention_seconds"]) / step
            found.append(row)
            print(
                f"round {repeat + 1}  products {whole:.3f} s of a step of {step:.3f} s: {row['share']:.2f}", flush=True
            )
    write(
        place(args, "limit"),
        "limit" if args.objective == "causal" else f"limit, masked, bert-{args.size}",
        "bench_limit.py",
        model=section,
        sequence_length=args.length,
        rows=args.rows,
        rate=args.rate if args.objective == "masked" else None,
        rounds=found,
    )


if __name__ == "__main__":
    main()
