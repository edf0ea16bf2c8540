"""What `run_clm.py` does before training: `datasets.map` tokenization and `group_texts`, on all cores.

Prints one JSON line with seconds and tokens.

    python data_datasets.py TOKENIZER TEXT.jsonl OUT --sequence-length 2048 --processes 2
"""

from __future__ import annotations

import json
import time
from itertools import chain
from typing import Any

from arguments import parse
from datasets import load_dataset
from transformers import AutoTokenizer


def main() -> None:
    """Tokenize and group, written to Arrow files."""
    args = parse(reads=False)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    started = time.perf_counter()
    raw = load_dataset("json", data_files=args.text, split="train", cache_dir=args.out)
    tokenized = raw.map(
        lambda rows: tokenizer(rows["text"]), batched=True, num_proc=args.processes, remove_columns=raw.column_names
    )
    size = args.sequence_length

    def group(rows: dict[str, Any]) -> dict[str, Any]:
        joined = {name: list(chain(*rows[name])) for name in rows}
        total = len(next(iter(joined.values()))) // size * size
        grouped = {name: [ids[i : i + size] for i in range(0, total, size)] for name, ids in joined.items()}
        grouped["labels"] = grouped["input_ids"].copy()
        return grouped

    grouped = tokenized.map(group, batched=True, num_proc=args.processes)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "tokens": len(grouped) * size}))


if __name__ == "__main__":
    main()
