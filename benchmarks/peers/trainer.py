"""What transformers' `run_clm.py` and `run_mlm.py` do by default, written for comparison: map, group_texts, Trainer.

Prints one JSON line: seconds of each optimiser step and the loss of the last. Defaults are those of the example
scripts: float32, eager, AdamW, linear schedule from 5e-5, all logits; masks are drawn by
DataCollatorForLanguageModeling.

With --best it is given what its scripts do not give it: no mask of ones, which keeps compiled models from attention
kernels that take none, no look at every loss, and on a GPU layers compiled one by one, for as a whole the model would
make a mask by itself.

    python trainer.py causal CONFIG_DIR TEXT.jsonl --sequence-length 512 --rows 8 --steps 12 [--bf16] [--compile --best]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


class StepTimes(TrainerCallback):
    """Seconds between the ends of optimiser steps; on CUDA by events, so that the host need not wait for them."""

    def __init__(self) -> None:
        self.ends: list[Any] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.on_step_end()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if not torch.cuda.is_available():
            self.ends.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.ends.append(event)

    def seconds(self) -> list[float]:
        """Of each step."""
        pairs = zip(self.ends, self.ends[1:], strict=False)
        if not torch.cuda.is_available():
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("objective", choices=["causal", "masked"])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rate", type=float, default=0.15, help="share of tokens masked")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--out", help="folder for the trained model")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--best", action="store_true", help="without a mask of ones and looks at each loss")
    parser.add_argument("--attention", default="sdpa", help="transformers' name; flash_attention_2 where it is")
    parser.add_argument("--tf32", action="store_true", help="products of float32 in 10 bits of mantissa, on a GPU")
    parser.add_argument("--liger", action="store_true", help="Liger's kernels; the package must be there")
    parser.add_argument("--loaders", type=int, default=0, help="processes that load")
    return parser.parse_args()


def grouped_texts(args: argparse.Namespace, tokenizer: Any) -> Any:
    """Documents tokenized, joined end to end and cut into rows, special tokens wherever they fall."""
    masked, length = args.objective == "masked", args.sequence_length
    if find_spec("datasets") is None:
        return rows_without_datasets(args, tokenizer)
    from datasets import load_dataset

    raw = load_dataset("json", data_files=args.text, split="train", cache_dir=tempfile.mkdtemp())
    tokenized = raw.map(
        lambda rows: tokenizer(rows["text"], return_special_tokens_mask=masked),
        batched=True,
        remove_columns=raw.column_names,
    )

    def group_texts(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {k: list(chain(*v)) for k, v in rows.items()}
        total = len(joined["input_ids"]) // length * length
        cut = {k: [v[i : i + length] for i in range(0, total, length)] for k, v in joined.items()}
        return cut if masked else {**cut, "labels": cut["input_ids"].copy()}

    return tokenized.map(group_texts, batched=True)


def rows_without_datasets(args: argparse.Namespace, tokenizer: Any) -> list[dict[str, list[int]]]:
    """As many of the same rows as the steps read, for machines that lack the package; Trainer takes a list, too."""
    masked, length, found = args.objective == "masked", args.sequence_length, []
    ids: list[int] = []
    special: list[int] = []
    for line in Path(args.text).read_text(encoding="utf-8").splitlines():
        document = tokenizer(json.loads(line)["text"], return_special_tokens_mask=True)
        ids += document["input_ids"]
        special += document["special_tokens_mask"]
        while len(ids) >= length:
            row, mask = ids[:length], special[:length]
            ids, special = ids[length:], special[length:]
            more = {"special_tokens_mask": mask} if masked else {"labels": row.copy()}
            found.append({"input_ids": row, "attention_mask": [1] * length, **more})
        if len(found) >= args.rows * args.steps:
            break
    return found


def without_mask(batch: dict[str, Any]) -> dict[str, Any]:
    """All but the attention mask: rows are full."""
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask"}


def main() -> None:
    """Train for a few steps and print the times."""
    args = parse()
    set_seed(1)
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows, masked = grouped_texts(args, tokenizer), args.objective == "masked"
    prepared = time.perf_counter()
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    config = AutoConfig.from_pretrained(args.model)
    model = auto.from_config(config, dtype=torch.float32, attn_implementation=args.attention)
    by_layers = args.compile and args.best and torch.cuda.is_available()
    for layer in model.base_model.layers if by_layers else ():
        layer.compile()
    times = StepTimes()
    training = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.rows,
        max_steps=args.steps,
        learning_rate=args.lr,
        bf16=args.bf16,
        torch_compile=args.compile and not by_layers,
        logging_nan_inf_filter=not args.best,
        tf32=True if args.tf32 else None,
        use_liger_kernel=args.liger,
        dataloader_num_workers=args.loaders,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    masks = DataCollatorForLanguageModeling(tokenizer, mlm_probability=args.rate) if masked else default_data_collator
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=(lambda rows: without_mask(masks(rows))) if args.best else masks,
        callbacks=[times],
    )
    result = trainer.train()
    if args.out:
        trainer.save_model(args.out)
    row = {"step_seconds": times.seconds(), "loss": result.training_loss, "prepare_seconds": prepared - started}
    if torch.cuda.is_available():
        row["memory_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps({**row, "threads": torch.get_num_threads(), "sequences": len(rows)}))


if __name__ == "__main__":
    main()
