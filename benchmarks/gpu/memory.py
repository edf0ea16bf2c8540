"""Peak memory of a step at a vocabulary of 128k against 1k, 8k tokens, what parameters themselves take left out.

    python benchmarks/gpu/memory.py --out FOLDER --scratch FOLDER [--device cpu --tiny]

The step is forward, backward, clipping and AdamW's update of a stock model in bf16, as `lmssl train` makes it. What is
taken off at every moment is what parameters take then: weights and the optimiser's two states, 12 bytes a parameter,
and 4 for each whose gradient exists (the output weight's is made in the forward pass, the body's one after the other in
the backward pass, when activations go). Asked: at most 1.15 times. On CPU nothing counts what a step holds, so that a
dry run only shows that the script works; `bench_memory.py` measures there.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from rows import Row, finish, run_rows
from setting import MODELS, TINY, parse, release
from torch import Tensor, nn

from lmssl.model.build import build_config, build_model
from lmssl.model.head import output_weight
from lmssl.objective.base import MicroBatch
from lmssl.objective.causal import CausalObjective
from lmssl.objective.module import LossModule
from lmssl.optim.groups import build_optimizer
from lmssl.recipe.model import FAMILIES
from lmssl.recipe.optim import AdamW
from lmssl.train.launch import CompileMode, compile_module

ASKED_RATIO = 1.15
BYTES_PER_PARAMETER = 12
"""Of a weight and two states in float32."""
BYTES_PER_GRADIENT = 4
VOCABULARIES = (1024, 131072)
DOCUMENT_TOKENS = 512
ROW_SECONDS = 12.0


class Meter:
    """The most that a step held at once beyond weights, states and those gradients that existed then."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.on_cuda = device == "cuda"
        self.kept_bytes = BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())
        self.output = output_weight(model)
        self.begin()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._made)

    def begin(self) -> None:
        """Forget what was, before a step."""
        self.gradient_bytes = BYTES_PER_GRADIENT * self.output.numel()
        self.peak_bytes = self.beyond_bytes = 0
        self.peak_gradient_bytes = 0
        if self.on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def look(self) -> None:
        """Take in what was held since the last look."""
        if not self.on_cuda:
            return
        held = torch.cuda.max_memory_allocated()
        beyond = held - self.kept_bytes - self.gradient_bytes
        self.peak_bytes = max(self.peak_bytes, held)
        if beyond > self.beyond_bytes:
            self.beyond_bytes, self.peak_gradient_bytes = beyond, self.gradient_bytes
        torch.cuda.reset_peak_memory_stats()

    def _made(self, parameter: Tensor) -> None:
        self.look()
        if parameter is not self.output:
            self.gradient_bytes += BYTES_PER_GRADIENT * parameter.numel()


def measure(args: argparse.Namespace, model_name: str, compile_: CompileMode, vocabulary: int) -> dict[str, Any]:
    """The peak of a step, and the most that is beyond the parameters' own at any moment, in bytes."""
    release()
    length, rows = (128, 2) if args.tiny else (2048, 4)
    fields = MODELS[model_name] | (TINY if args.tiny else {}) | {"vocab_size": vocabulary}
    section = FAMILIES[fields["kind"]](**fields)
    config = build_config(section, vocab_size=vocabulary, sequence_length=length, tokenizer=None)
    device = torch.device(args.device)
    model = build_model(config, objective="causal", seed=1)
    module = LossModule(model, CausalObjective(), bf16=True).train().to(device)
    meter = Meter(model, device.type)
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
    for _ in range(4):  # what is made once is there by the last
        meter.begin()
        (module(micro.on(device))["causal"] / ids_BT.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        meter.look()
        optimizer.zero_grad()
    own = {"kept_bytes": meter.kept_bytes, "gradient_bytes": meter.peak_gradient_bytes}
    return {"peak_bytes": meter.peak_bytes, **own, "beyond_bytes": meter.beyond_bytes}


def main() -> None:
    """Two vocabularies for each model; a row each."""
    args = parse(__doc__)
    ways: tuple[tuple[str, CompileMode], ...] = (("350M", "layers"), ("124M", "layers"), ("350M", "off"))
    rows = []
    for model, compile_ in ways:
        for vocabulary in VOCABULARIES:
            about = {"model": model, "compile": compile_, "vocabulary": vocabulary, "asked_ratio": ASKED_RATIO}
            rows.append(Row(about, partial(measure, args, model, compile_, vocabulary), ROW_SECONDS))
    run_rows(args, "memory", rows)
    finish(args)


if __name__ == "__main__":
    main()
