"""What the stages of gpu.sh share: device, text, models, one session driven for some steps, one line of JSON a row."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lmssl.objective.base import MicroBatch
from lmssl.recipe.load import load_recipe
from lmssl.recipe.sections import Recipe
from lmssl.train.agree import Agreement
from lmssl.train.launch import frozen_objects
from lmssl.train.lock import RunLock
from lmssl.train.opening import open_session
from lmssl.train.peaks import peak_flops
from lmssl.train.phases import Phases
from lmssl.train.session import Session
from lmssl.train.step import Measured, train_step
from lmssl.train.telemetry import flops_per_token

MFU_FORMULA = (
    "MFU = tokens/s x FLOPs per token / peak of dense bf16 products; FLOPs per token of a decoder = "
    "6 x (weights of all layers' matrices + vocabulary x width) + 12 x heads x head width x layers x length / 2, "
    "as if every sequence were one document"
)
_PACKAGES = ("torch", "triton", "transformers", "accelerate", "tokenizers", "torchao", "liger_kernel", "numpy")
_MEAN_DOCUMENT_BYTES = 4000
"""About a thousand tokens, as on the web."""


def parse(description: str | None, **more: Any) -> argparse.Namespace:
    """The command line of a stage; `more`: further options and their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models too small to mean anything, to try the script")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--scratch", type=Path, required=True, help="folder of text, caches and runs")
    parser.add_argument("--seconds", type=float, default=1e9, help="no row is begun that would take longer in all")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; try --device cpu --tiny")
    args.deadline = time.monotonic() + args.seconds
    args.num_errors = 0
    return args


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
    """Append one row as soon as it is known, and show it."""
    row = {
        "benchmark": f"gpu, {stage}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "run": os.environ.get("LMSSL_GPU_RUN", ""),
        "tiny": args.tiny,
        "machine": machine(args.device),
        **fields,
    }
    args.num_errors += "error" in fields
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"gpu-{stage}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{stage}: {json.dumps(fields)[:600]}", flush=True)


def finish(args: argparse.Namespace) -> None:
    """End the stage; with status 1 where a row failed."""
    sys.exit(1 if args.num_errors else 0)


def text_file(args: argparse.Namespace) -> Path:
    """JSON lines of source code that is on every machine: pieces of random lengths, the same in every run."""
    path: Path = args.scratch / "text.jsonl"
    if path.exists():
        return path
    draw = random.Random(1)
    limit = 300_000 if args.tiny else 40_000_000
    rows, size = [], 0
    for source in _sources():
        text = source.read_text(encoding="utf-8", errors="ignore")
        start = 0
        while start < len(text):
            length = max(200, int(draw.lognormvariate(0.0, 1.0) * _MEAN_DOCUMENT_BYTES / 1.65))  # e^0.5 is its mean
            piece = text[start : start + length]
            start += length
            rows.append(json.dumps({"text": piece}))
            size += len(piece)
        if size > limit:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text("\n".join(rows) + "\n", encoding="utf-8")
    partial.rename(path)
    return path


def _sources() -> Iterator[Path]:
    yield from sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    yield from sorted(Path(torch.__file__).parent.rglob("*.py"))


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (hidden, intermediate, layers, heads), strict=True))


TINY = _sizes(64, 128, 2, 2)
GPT = {"tie_word_embeddings": True, "vocab_size": 50304}
"""GPT-2's vocabulary, rounded up to a multiple of 128."""
MODELS: dict[str, dict[str, Any]] = {
    "124M": {"kind": "llama", **_sizes(768, 2048, 12, 12), **GPT},
    "350M": {"kind": "qwen3", **_sizes(1024, 2816, 24, 16), **GPT},
    "1.3B": {"kind": "qwen3", **_sizes(2048, 5632, 24, 16), **GPT},
    "ModernBERT-base": {
        "kind": "modernbert",
        **_sizes(768, 1152, 22, 12),
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "vocab_size": 50368,
    },
}
"""The last is the shape of ModernBERT-base (Warner et al. 2024), and of Ettin's encoder of 150 M."""


def recipe(
    args: argparse.Namespace,
    name: str,
    model: str,
    *,
    length: int,
    micro_sequences: int,
    micro_batches: int = 1,
    steps: int,
    **changes: Any,
) -> Recipe:
    """A recipe of `MODELS` on the text; `changes` are sections' fields, as `train={...}`."""
    section = dict(MODELS[model])
    masked = section["kind"] == "modernbert"
    if args.tiny:
        section |= TINY | ({"vocab_size": 32768} if "vocab_size" in section else {})
    batch_tokens = length * micro_sequences * micro_batches
    plain: dict[str, Any] = {
        "name": "gpu",
        "out": str(args.scratch / f"run-{name}-{time.monotonic_ns()}"),
        "tokenizer": {"path": "tokenizer/bpe-32k-masked" if masked else "tokenizer/bpe-32k"},
        "data": {
            "sequence_length": length,
            "mixture": [{"name": "text", "kind": "jsonl", "path": str(text_file(args))}],
            "validation": None,
            "cache": str(args.scratch / "cache"),
            "workers": 0,  # a thread gathers: starting a process takes seconds, in every row
        },
        "objective": {"kind": "masked", "rate": 0.3} if masked else {"kind": "causal"},
        "model": section,
        "optim": {"kind": "adamw", "lr": 3e-4},
        "schedule": {"kind": "constant", "warmup_tokens": 0},
        "train": {
            "tokens": batch_tokens * steps,
            "batch_tokens": batch_tokens,
            "micro_batch_sequences": micro_sequences,
            "compile": "layers",
            "precision": "bf16",  # also where the script is tried on a processor that would choose otherwise
        },
        "checkpoint": {"every_steps": None},
    }
    for key, value in changes.items():
        plain[key] = {**plain.get(key, {}), **value}
    path = args.scratch / f"{name}.yaml"
    path.write_text(json.dumps(plain), encoding="utf-8")
    return load_recipe(path).recipe


class Clock:
    """Ends of steps: events in the device's queue, which nobody waits for until the end."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        """A step's work ends here."""
        if self.device == "cpu":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        """Between marks."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device == "cpu":
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


@dataclass
class Driven:
    """What some steps gave."""

    step_seconds: list[float] = field(default_factory=list)
    """From the end of one step to the end of the next; the first is from its beginning."""
    losses: list[float] = field(default_factory=list)
    tokens_per_step: int = 0
    memory_bytes: int = 0
    num_parameters: int = 0
    num_documents: float = 0.0
    """Segments in a sequence, on average."""
    flops_per_token: int = 0

    def rate(self, warmup: int) -> float:
        """Tokens per second, by the median step."""
        return self.tokens_per_step / statistics.median(self.step_seconds[warmup:])

    def utilisation(self, rate: float, device: str) -> float | None:
        """Of the device's dense peak in bf16; None where that is not known."""
        peak = peak_flops(device_name(device), "bf16")
        return None if peak is None else rate * self.flops_per_token / peak


def drive(
    recipe: Recipe, device: str, *, steps: int, around: Callable[[int, Callable[[], None]], None] | None = None
) -> Driven:
    """Make steps as `train.loop` does: the host reads each step's numbers while the device makes the next.

    Args:
        around: calls its second argument, a step; told the step's number.
    """
    release()
    lock = RunLock(Path(recipe.out_path))
    session = open_session(recipe, lambda text: print(f"  {text}", flush=True), lock=lock)
    found = Driven(tokens_per_step=recipe.train.batch_tokens, num_parameters=session.backend.num_parameters)
    found.flops_per_token = _flops(session)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    agreement, phases, clock = Agreement(lambda: False, lambda: 0.0), Phases(session.accelerator.device), Clock(device)
    batches, pending = session.batches(), []
    try:
        with frozen_objects():
            clock.mark()
            for number in range(steps):
                micro_batches = next(batches)
                found.num_documents = documents(micro_batches)
                step = _Step(session, micro_batches, number, agreement, phases)
                (around or _plainly)(number, step)
                clock.mark()
                pending.append(step.measured)
                while len(pending) > 1:
                    found.losses.append(_loss(pending.pop(0)))
            found.losses.append(_loss(pending.pop()))
        found.step_seconds = clock.seconds()
        found.memory_bytes = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    finally:
        batches.close()  # type: ignore[attr-defined]
        session.saver.close()
        session.backend.close()
        lock.release()
    return found


@dataclass
class _Step:
    session: Session
    micro_batches: list[MicroBatch]
    number: int
    agreement: Agreement
    phases: Phases
    measured: Measured | None = None

    def __call__(self) -> None:
        session = self.session
        session.begin_step(self.micro_batches[0])
        self.measured = train_step(
            session.backend,
            session.objective,
            self.micro_batches,
            lr_ratio=1.0,
            max_grad_norm=session.recipe.optim.max_grad_norm,
            seed=session.recipe.seed,
            step=self.number,
            agreement=self.agreement,
            phases=self.phases,
        )


def _plainly(_: int, step: Callable[[], None]) -> None:
    step()


def _loss(measured: Measured | None) -> float:
    assert measured is not None
    measured.wait()
    return float(measured.loss.item())


def _flops(session: Session) -> int:
    vocabulary = session.core.model.config.get_text_config().vocab_size
    per_token = flops_per_token(session.recipe, vocabulary)
    return 0 if per_token is None else next(iter(per_token.values()))


def documents(micro_batches: list[MicroBatch]) -> float:
    """Segments of a sequence, on average."""
    return statistics.mean(float(micro.inputs["segments_BT"].amax(1).float().mean()) for micro in micro_batches)


def release() -> None:
    """Give back what an earlier model held on the device."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help."""
    return isinstance(error, torch.OutOfMemoryError)
