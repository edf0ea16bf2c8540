"""What transformers' `run_clm.py` does by default, written for comparison: map, group_texts, Trainer.

Prints one JSON line: seconds of each optimiser step and the loss of the last. Defaults are those of the example
script: float32, eager, AdamW, linear schedule from 5e-5, all logits.

    python trainer_clm.py CONFIG_DIR TEXT.jsonl --sequence-length 512 --rows 8 --steps 12 [--bf16] [--compile]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import chain
from typing import Any

import torch
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


class StepTimes(TrainerCallback):
    """Seconds between the ends of optimiser steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    """Train for a few steps and print the times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    set_seed(1)
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    raw = load_dataset("json", data_files=args.text, split="train", cache_dir=tempfile.mkdtemp())
    tokenized = raw.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=raw.column_names)
    length = args.sequence_length

    def group_texts(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {k: list(chain(*v)) for k, v in rows.items()}
        total = len(joined["input_ids"]) // length * length
        cut = {k: [v[i : i + length] for i in range(0, total, length)] for k, v in joined.items()}
        return {**cut, "labels": cut["input_ids"].copy()}

    grouped = tokenized.map(group_texts, batched=True)
    prepared = time.perf_counter()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=torch.float32)
    times = StepTimes()
    training = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.rows,
        max_steps=args.steps,
        bf16=args.bf16,
        torch_compile=args.compile,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=grouped,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[times],
    )
    result = trainer.train()
    seconds = [b - a for a, b in zip(times.ends, times.ends[1:], strict=False)]
    row = {"step_seconds": seconds, "loss": result.training_loss, "prepare_seconds": prepared - started}
    print(json.dumps({**row, "threads": torch.get_num_threads(), "sequences": len(grouped)}))


if __name__ == "__main__":
    main()
