"""MosaicML Streaming: concatenated token blocks through MDSWriter, one writer per process, then random reads.

Prints one JSON line with seconds, tokens and the rate of random reading.

    python data_mds.py TOKENIZER TEXT.jsonl OUT --sequence-length 2048 --processes 2 --reads 2000
"""

from __future__ import annotations

import json
import random
import sys
import time
from multiprocessing import Process, Queue
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
from arguments import parse
from transformers import AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature  # noqa: F401  (before the stand-ins below)

# Its image datasets import torchvision, which does not load beside every build of torch; nothing here uses them.
STAND_INS = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
for name in STAND_INS:
    sys.modules[name] = MagicMock(VisionDataset=object)
from streaming import LocalDataset, MDSWriter  # noqa: E402

for name in STAND_INS:
    del sys.modules[name]


def write(args: Any, number: int, counts: Any) -> None:
    """Tokenize every k-th line into blocks."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    held: list[int] = []
    size, blocks = args.sequence_length, 0
    with (
        MDSWriter(out=f"{args.out}/{number}", columns={"tokens": "ndarray:int32"}) as writer,
        open(args.text, encoding="utf-8") as file,
    ):
        for i, line in enumerate(file):
            if i % args.processes != number:
                continue
            held += tokenizer(json.loads(line)["text"])["input_ids"]
            whole = len(held) // size * size
            for start in range(0, whole, size):
                writer.write({"tokens": np.asarray(held[start : start + size], dtype=np.int32)})
                blocks += 1
            held = held[whole:]
    counts.put(blocks)


def main() -> None:
    """Write and read."""
    args = parse(reads=True)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    counts: Any = Queue()
    started = time.perf_counter()
    processes = [Process(target=write, args=(args, i, counts)) for i in range(args.processes)]
    for process in processes:
        process.start()
    blocks = sum(counts.get() for _ in processes)
    for process in processes:
        process.join()
    seconds = time.perf_counter() - started
    data = LocalDataset(local=f"{args.out}/0")
    order = random.Random(1)
    indices = [order.randrange(len(data)) for _ in range(args.reads)]
    for i in indices[:100]:
        data[i]["tokens"].astype(np.int64)
    began = time.perf_counter()
    for i in indices:
        data[i]["tokens"].astype(np.int64)
    rate = args.reads * args.sequence_length / (time.perf_counter() - began)
    print(json.dumps({"seconds": seconds, "tokens": blocks * args.sequence_length, "read_tokens_per_second": rate}))


if __name__ == "__main__":
    main()
