"""datatrove: DocumentTokenizer with the local executor, one task and worker per core.

Prints one JSON line with seconds and tokens.

    python data_datatrove.py TOKENIZER TEXT_FOLDER OUT --sequence-length 2048 --processes 2
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import numpy as np
from arguments import parse
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main() -> None:
    """Tokenize a folder of JSONL files."""
    args = parse(reads=False)
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        LocalPipelineExecutor(
            pipeline=[
                JsonlReader(args.text),
                DocumentTokenizer(f"{args.out}/tokens", tokenizer_name_or_path=f"{args.tokenizer}/tokenizer.json"),
            ],
            tasks=args.processes,
            workers=args.processes,
            logging_dir=f"{args.out}/logs",
        ).run()
    seconds = time.perf_counter() - started
    tokens = sum(len(np.memmap(path, dtype="<u2")) for path in Path(args.out, "tokens").rglob("*.ds"))
    print(json.dumps({"seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main()
