"""What the stages of gpu.sh share: their options, text, models, and one session driven for some steps."""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rows import device_name

from lmssl.model import flops
from lmssl.model.source import stand_in
from lmssl.objective.base import MicroBatch
from lmssl.recipe.load import load_recipe
from lmssl.recipe.sections import Recipe
from lmssl.show import target_ratio
from lmssl.train.agree import Agreement
from lmssl.train.launch import frozen_objects
from lmssl.train.lock import RunLock
from lmssl.train.opening import open_session
from lmssl.train.peaks import peak_flops
from lmssl.train.phases import Phases
from lmssl.train.session import Session
from lmssl.train.step import Measured, train_step

MFU_FORMULA = (
    "MFU = tokens/s x FLOPs per token / peak of dense bf16 products; FLOPs per token of a decoder = "
    "6 x (weights of all layers' matrices + vocabulary x width) + 12 x heads x head width x layers x length / 2, "
    "as if every sequence were one document"
)
DOCUMENTS_FORMULA = (
    "MFU by documents counts only attention that is needed: instead of length / 2, (sum of document length^2 / 2) / "
    "tokens (in an encoder, which sees both ways, twice that, and no more than its window in local layers)"
)
_MEAN_DOCUMENT_BYTES = 4000
"""About a thousand tokens, as on the web."""


def parse(description: str | None, **more: Any) -> argparse.Namespace:
    """The command line of a stage; `more`: further options and their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models too small to mean anything, to try the script")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--scratch", type=Path, required=True, help="folder of text, caches and runs")
    parser.add_argument("--until", type=float, default=float("inf"), help="when to end, in seconds since 1970")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; try --device cpu --tiny")
    args.deadline, args.num_errors = args.until, 0
    return args


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
    flops_per_token: float = 0.0
    """As if every sequence were one document."""
    document_flops_per_token: float = 0.0
    """By the lengths of the segments that were read."""

    def rate(self, warmup: int) -> float:
        """Tokens per second, by the median step."""
        return self.tokens_per_step / statistics.median(self.step_seconds[warmup:])

    def utilisation(self, rate: float, device: str) -> dict[str, float | None]:
        """Of the device's dense peak in bf16, counted both ways; None where that is not known."""
        peak = peak_flops(device_name(device), "bf16")
        counted = {"mfu": self.flops_per_token, "mfu_documents": self.document_flops_per_token}
        return {name: None if peak is None else rate * each / peak for name, each in counted.items()}


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
    lengths = Counter[int]()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    agreement, phases, clock = Agreement(lambda: False, lambda: 0.0), Phases(session.accelerator.device), Clock(device)
    batches, pending = session.batches(), []
    try:
        with frozen_objects():
            clock.mark()
            for number in range(steps):
                micro_batches = next(batches)
                lengths.update(document_lengths(micro_batches))
                step = _Step(session, micro_batches, number, agreement, phases)
                (around or _plainly)(number, step)
                clock.mark()
                pending.append(step.measured)
                while len(pending) > 1:
                    found.losses.append(_loss(pending.pop(0)))
            found.losses.append(_loss(pending.pop()))
        found.step_seconds = clock.seconds()
        count_flops(found, session, lengths, steps)
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


def count_flops(found: Driven, session: Session, lengths: Counter[int], steps: int) -> None:
    """Operations a token, and documents a sequence; tokens of padding attend to nothing."""
    recipe, tokens = session.recipe, found.tokens_per_step * steps
    vocabulary, (model, _) = session.core.model.config.get_text_config().vocab_size, stand_in(recipe.model)

    def per_token(length: int) -> int:
        return flops.trained_flops_per_token(
            model,
            recipe.objective,
            vocab_size=vocabulary,
            sequence_length=length,
            target_ratio=target_ratio(recipe.objective),
        )

    length = recipe.data.sequence_length
    found.num_documents = lengths.total() / (tokens / length)
    found.flops_per_token = per_token(length)
    text = sum(each * count for each, count in lengths.items())
    needed = sum(each * count * per_token(each) for each, count in lengths.items())
    found.document_flops_per_token = (needed + (tokens - text) * per_token(0)) / tokens


def document_lengths(micro_batches: list[MicroBatch]) -> list[int]:
    """Tokens of every segment, padding left out."""
    found: list[int] = []
    for micro in micro_batches:
        segments_BT = micro.inputs["segments_BT"]
        first_BT = torch.ones_like(segments_BT, dtype=torch.bool)
        first_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
        starts = first_BT.reshape(-1).nonzero()[:, 0]
        ends = torch.cat([starts[1:], starts.new_tensor([segments_BT.numel()])])
        found += (ends - starts)[segments_BT.reshape(-1)[starts] != 0].tolist()
    return found


def release() -> None:
    """Give back what an earlier model held on the device."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help."""
    return isinstance(error, torch.OutOfMemoryError)
