"""One masked training step with the head at targets only, and at every position: seconds and peak memory.

    python benchmarks/bench_head.py [--repeats 3] [--size mini] [--tiny]

BERT with a vocabulary of 30,528, 15 % of random tokens masked, compiled and in the precision that a run chooses on this
processor. Three ways: our head at the targets; the same chunked head at every position; and logits of every position at
once with torch's cross-entropy, as the stock class does it. Each is a process of its own; memory is the process's peak,
compiling included, less what it had before the first step. Results are appended to benchmarks/results/head.jsonl.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from entrants import masked_model
from record import inner, place, without_compiling, write
from torch import Tensor, nn
from torch.nn import functional as F

from lmssl.data.batch import SequenceBatch
from lmssl.model.build import build_config, build_model
from lmssl.model.encoder import encode, masked_head
from lmssl.model.head import IGNORE
from lmssl.objective.masked import MaskedObjective
from lmssl.objective.masking import Masking
from lmssl.objective.module import LossModule, autocast
from lmssl.recipe.encoders import BertModel
from lmssl.recipe.objective import MaskedObjective as Section
from lmssl.shipped import find
from lmssl.tokenizer.load import Tokenizer, load_tokenizer
from lmssl.tokenizer.offsets import surface_bytes
from lmssl.train.launch import keep_memory
from lmssl.train.precision import bf16_is_faster

ENTRANTS = ("targets only", "every position, in chunks", "every position at once")


class WholeHead(nn.Module):
    """Logits of every position, then torch's cross-entropy."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The summed loss."""
        with autocast(torch.device("cpu"), self.dtype):
            hidden = encode(self.model, inputs["ids_BT"], inputs["segments_BT"], inputs["offsets_BT"])
            head = masked_head(self.model)
            logits = (head.transform(hidden) @ head.weight_VD.t() + head.bias_V).float()
        labels = torch.full_like(inputs["ids_BT"], IGNORE).scatter(1, inputs["places_BC"], inputs["targets_BC"])
        return {"masked": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")}


def batch(args: argparse.Namespace, tokenizer: Tokenizer) -> SequenceBatch:
    """Rows of one document each."""
    shape = args.rows, args.length
    ids = np.random.default_rng(0).integers(10, tokenizer.num_tokens, shape)
    ids[:, 0], ids[:, -1] = tokenizer.cls_id, tokenizer.sep_id
    offsets = np.tile(np.arange(args.length), (args.rows, 1))
    return SequenceBatch(ids, np.ones(shape, np.int32), offsets, np.arange(args.rows), np.ones(args.rows))


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, and the peak of memory above what the process had before."""
    keep_memory()
    tokenizer = load_tokenizer(find(Path("tokenizer/wordpiece-30k")))
    with tempfile.TemporaryDirectory() as folder:
        section = masked_model(Path(folder), args)
    config = build_config(
        BertModel.model_validate(section),
        objective="masked",
        vocab_size=section["vocab_size"],
        sequence_length=args.length,
        tokenizer=tokenizer,
    )
    model = build_model(config, objective="masked", seed=1)
    masking = Masking.of(Section(kind="masked", rate=args.rate), tokenizer, 1, 1000)
    objective = MaskedObjective(masking, surface_bytes(tokenizer))
    inputs = dict(objective.prepare(batch(args, tokenizer)).inputs)
    if name == ENTRANTS[1]:
        labels = torch.full_like(inputs["ids_BT"], IGNORE).scatter(1, inputs["places_BC"], inputs["targets_BC"])
        inputs |= {"places_BC": torch.arange(args.length).expand(args.rows, -1).contiguous(), "targets_BC": labels}
    ours = LossModule(model, objective, bf16=args.precision == "bf16")
    module = WholeHead(model, ours.dtype) if name == ENTRANTS[2] else ours
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    module.compile(dynamic=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(args.steps):
        started = time.perf_counter()
        module(inputs)["masked"].backward()
        module.zero_grad()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": statistics.median(seconds[2:]), "memory_bytes": peak * 1024}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.15)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--size", choices=["mini", "small"], default="mini", help="of BERT")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: bf16 where the processor multiplies it")
    parser.add_argument("--tiny", action="store_true", help="a model too small to mean anything, to try the script")
    parser.add_argument("--inner", choices=ENTRANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default: the results; with --tiny the record is printed")
    args = parser.parse_args(words)
    args.precision = args.precision or ("bf16" if bf16_is_faster("cpu") else "fp32")
    if args.tiny:
        without_compiling()
        args.repeats, args.steps, args.length, args.rows = 1, 3, 64, 2
    return args


def main() -> None:
    """Run every way in rounds and append the record."""
    args = parse()
    if args.inner:
        print(json.dumps(measure(args.inner, args)))
        return
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ENTRANTS}
    for _ in range(args.repeats):
        for name in ENTRANTS:
            rows[name].append(inner("--inner", name))
            print(name, rows[name][-1], flush=True)
    write(
        place(args, "head"),
        "head",
        "bench_head.py",
        size="tiny" if args.tiny else args.size,
        precision=args.precision,
        rate=args.rate,
        rows=args.rows,
        sequence_length=args.length,
        entrants=rows,
    )


if __name__ == "__main__":
    main()
