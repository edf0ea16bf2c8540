"""litgpt's own `pretrain` on the model shape and text of the others: its setup, its loop, its defaults.

Its defaults: bf16 autocast, a compiled model, and on CPU an AdamW that its code forbids to be fused there.
The data module gives it batches of random rows; the times between its requests for one are those of the steps.
Prints one JSON line.

    python litgpt_pretrain.py CONFIG_DIR TEXT.jsonl --sequence-length 512 --rows 8 --steps 12
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.pretrain import setup
from nanogpt import write_ids
from torch.utils.data import DataLoader, IterableDataset


class Rows(IterableDataset[torch.Tensor]):
    """Batches of random rows, one id longer than a sequence; remembers when each was asked for."""

    def __init__(self, ids: np.memmap[Any, Any], rows: int, length: int) -> None:
        self.ids, self.rows, self.length = ids, rows, length
        self.asked = [time.perf_counter()]

    def __iter__(self) -> Iterator[torch.Tensor]:
        random = np.random.default_rng(1337)
        while True:
            self.asked.append(time.perf_counter())
            starts = random.integers(len(self.ids) - self.length, size=self.rows)
            yield torch.from_numpy(np.stack([self.ids[i : i + self.length + 1] for i in starts]).astype(np.int64))


class Data(DataModule):
    """What litgpt trains and, before its first step, validates on."""

    def __init__(self, training: Rows, validation: Rows) -> None:
        super().__init__()
        self.training, self.validation = training, validation

    def connect(self, *_: Any, **__: Any) -> None:
        """Everything is known already."""

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(self.training, batch_size=None)

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(self.validation, batch_size=None)


def shape(folder: Path, length: int) -> Config:
    """The config of a stock llama in litgpt's words."""
    stock = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Config(
        name="bench",
        block_size=length,
        n_layer=stock["num_hidden_layers"],
        n_embd=stock["hidden_size"],
        vocab_size=stock["vocab_size"],
        padded_vocab_size=stock["vocab_size"],
        n_head=stock["num_attention_heads"],
        n_query_groups=stock["num_key_value_heads"],
        intermediate_size=stock["intermediate_size"],
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )


def main() -> None:
    """Train for a few steps and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--precision", default=None, help="by Lightning's names, such as 32-true")
    args = parser.parse_args()
    sys.argv = [sys.argv[0], "bench"]  # litgpt reads it again, as its own command line, when it saves
    config = shape(args.model, args.sequence_length)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        ids = write_ids(args.model, args.text, Path(scratch) / "train.bin", config.vocab_size)
        training = Rows(ids, args.rows, args.sequence_length)
        setup(
            model_name="bench",
            model_config=config,
            out_dir=Path(scratch) / "out",
            data=Data(training, Rows(ids, args.rows, args.sequence_length)),
            train=TrainArgs(
                save_interval=None,
                global_batch_size=args.rows,
                micro_batch_size=args.rows,
                max_tokens=args.steps * args.rows * args.sequence_length,
                max_norm=1.0,
                min_lr=4e-5,
                lr_warmup_steps=2,
                tie_embeddings=bool(json.loads((args.model / "config.json").read_text())["tie_word_embeddings"]),
            ),
            eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
            devices=1,
            precision=args.precision,
            logger_name="csv",
        )
    # The first request follows compiling for validation, the last one comes after the last step.
    asked = [training.asked[0], *training.asked[2 : args.steps + 2]]
    seconds = [b - a for a, b in pairwise(asked)]
    print(json.dumps({"step_seconds": seconds, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
