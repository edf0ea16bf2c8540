"""Peak memory of a step at a vocabulary of 128k against 1k, 8k tokens, what parameters themselves take left out.

    python benchmarks/gpu/memory.py --out FOLDER --scratch FOLDER [--device cpu --tiny]

The step is forward, backward, clipping and AdamW's update of a stock model in bf16, as `lmssl train` makes it. Weights,
gradients and the optimiser's two states are taken off: 16 bytes a parameter. Asked: at most 1.15 times. On CPU nothing
counts what a step holds, so that a dry run only shows that the script works; `bench_memory.py` measures there.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from setting import MODELS, TINY, finish, parse, release, write

from lmssl.model.build import build_config, build_model
from lmssl.objective.base import MicroBatch
from lmssl.objective.causal import CausalObjective
from lmssl.objective.module import LossModule
from lmssl.optim.groups import build_optimizer
from lmssl.recipe.model import FAMILIES
from lmssl.recipe.optim import AdamW
from lmssl.train.launch import CompileMode, compile_module

ASKED_RATIO = 1.15
BYTES_PER_PARAMETER = 16
VOCABULARIES = (1024, 131072)
DOCUMENT_TOKENS = 512


def measure(args: argparse.Namespace, model_name: str, compile_: CompileMode, vocabulary: int) -> dict[str, int]:
    """The peak of a step, and what of it is beyond the parameters' own, in bytes."""
    release()
    length, rows = (128, 2) if args.tiny else (2048, 4)
    fields = MODELS[model_name] | (TINY if args.tiny else {}) | {"vocab_size": vocabulary}
    section = FAMILIES[fields["kind"]](**fields)
    config = build_config(section, vocab_size=vocabulary, sequence_length=length, tokenizer=None)
    device = torch.device(args.device)
    model = build_model(config, objective="causal", seed=1)
    module = LossModule(model, CausalObjective(), bf16=True).train().to(device)
    compile_module(module, compile_)
    optimizer = build_optimizer(model, AdamW(kind="adamw", lr=1e-4))
    index_T = torch.arange(length)
    ids_BT = torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(1))
    inputs = {
        "ids_BT": ids_BT,
        "segments_BT": (index_T // DOCUMENT_TOKENS + 1).to(torch.int32).expand(rows, -1).contiguous(),
        "offsets_BT": (index_T % DOCUMENT_TOKENS).expand(rows, -1).contiguous(),
        "targets_BT": ids_BT.roll(-1, 1),
    }
    micro = MicroBatch(inputs, {"causal": ids_BT.numel()}, 0.0, 0)
    for step in range(4):
        if step == 2 and device.type == "cuda":  # all that is made once is there
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        (module(micro.on(device))["causal"] / ids_BT.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    own = BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())
    return {"vocabulary": vocabulary, "peak_bytes": peak, "parameters_bytes": own, "beyond_bytes": peak - own}


def main() -> None:
    """Two vocabularies for each model; a row at once."""
    args = parse(__doc__)
    ways: tuple[tuple[str, CompileMode], ...] = (("350M", "layers"), ("124M", "layers"), ("350M", "off"))
    for model, compile_ in ways:
        if not args.tiny and time.monotonic() + 25 > args.deadline:
            print(f"memory: no time for {model}, {compile_}")
            continue
        about: dict[str, Any] = {"model": model, "compile": compile_, "asked_ratio": ASKED_RATIO}
        try:
            small, large = (measure(args, model, compile_, vocabulary) for vocabulary in VOCABULARIES)
        except Exception as error:
            write(args, "memory", **about, error=f"{type(error).__name__}: {error}"[:2000])
            continue
        ratio = large["beyond_bytes"] / small["beyond_bytes"] if args.device == "cuda" else None
        write(args, "memory", **about, rows=[small, large], ratio=ratio)
    finish(args)


if __name__ == "__main__":
    main()
