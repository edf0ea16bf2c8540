"""Text and tokens that the other stages read, made once: `lmssl prepare` for both tokenizers.

python benchmarks/gpu/prepare.py --out FOLDER --scratch FOLDER [--device cpu --tiny]
"""

from __future__ import annotations

import subprocess
import sys
import time

from rows import write
from setting import parse, recipe, text_file


def main() -> None:
    """Write the text, then prepare it."""
    args = parse(__doc__)
    began = time.monotonic()
    path = text_file(args)
    made = time.monotonic()
    running = []
    for name, model in (("causal", "124M"), ("masked", "ModernBERT-base")):
        recipe(args, f"prepare-{name}", model, length=128, micro_sequences=2, steps=1)
        command = [sys.executable, "-m", "lmssl", "prepare", str(args.scratch / f"prepare-{name}.yaml")]
        running.append(subprocess.Popen(command))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("lmssl prepare failed")
    seconds = {"text": made - began, "tokens": time.monotonic() - made}
    write(args, "prepare", text_bytes=path.stat().st_size, seconds=seconds)


if __name__ == "__main__":
    main()
