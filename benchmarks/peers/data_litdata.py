"""litdata: `optimize` with a TokensLoader, then random reads of its blocks.

Prints one JSON line with seconds, tokens and the rate of random reading.

    python data_litdata.py TOKENIZER TEXT.jsonl OUT --sequence-length 2048 --processes 2 --reads 2000
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from arguments import parse
from litdata import StreamingDataset, TokensLoader, optimize
from transformers import AutoTokenizer


def tokenize(part: tuple[str, int, int], tokenizer: Any) -> Iterator[torch.Tensor]:
    """Ids of every k-th line of the file, a tensor per document."""
    path, number, count = part
    with open(path, encoding="utf-8") as file:
        for i, line in enumerate(file):
            if i % count == number:
                yield torch.tensor(tokenizer(json.loads(line)["text"])["input_ids"], dtype=torch.int32)


def main() -> None:
    """Write and read."""
    args = parse(reads=True)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    started = time.perf_counter()
    optimize(
        fn=partial(tokenize, tokenizer=tokenizer),
        inputs=[(args.text, i, args.processes) for i in range(args.processes)],
        output_dir=args.out,
        chunk_bytes="64MB",
        num_workers=args.processes,
        item_loader=TokensLoader(),
    )
    seconds = time.perf_counter() - started
    data = StreamingDataset(args.out, item_loader=TokensLoader(block_size=args.sequence_length), shuffle=False)
    order = random.Random(1)
    indices = [order.randrange(len(data)) for _ in range(args.reads)]
    for i in indices[:100]:
        data[i].long()
    began = time.perf_counter()
    for i in indices:
        data[i].long()
    rate = args.reads * args.sequence_length / (time.perf_counter() - began)
    row = {"seconds": seconds, "tokens": len(data) * args.sequence_length, "read_tokens_per_second": rate}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
