"""One document as long as its file, without a newline: time linear in its length, memory as documented."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs import write_lines

MEASURED = """
import sys, time
from pathlib import Path
from lmssl.data.stream import SequenceStream
from lmssl.recipe.data import DataSection, JsonlCorpus
from lmssl.tokenizer.load import load_tokenizer

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

for path in sys.argv[3:]:
    before, began = peak(), time.process_time()
    corpus = JsonlCorpus(name="c", kind="jsonl", path=path)
    section = DataSection(sequence_length=2048, mixture=(corpus,), validation=None)
    stream = SequenceStream.open(section, load_tokenizer(Path(sys.argv[1])), 1, Path(sys.argv[2]))
    assert stream.num_sequences_per_epoch()["c"]
    print(time.process_time() - began, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
def test_four_times_the_length_takes_four_times_the_time_and_bounded_memory(root: Path, tmp_path: Path) -> None:
    unit = " ".join(f"word{i * 7919 % 9973}" for i in range(10_007)) + " "
    paths = []
    for name, num_bytes in (("first", 10**5), ("small", 5 * 10**6), ("large", 20 * 10**6)):
        text = (unit * (num_bytes // len(unit) + 1))[:num_bytes]
        paths.append(write_lines(tmp_path / f"{name}.jsonl", [{"text": text}]))
    command = [sys.executable, "-c", MEASURED, str(root / "tokenizer" / "bpe-4k"), str(tmp_path / "cache"), *paths]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    _, small, large = ([float(value) for value in line.split()] for line in done.stdout.splitlines())
    assert large[0] < 6 * small[0]
    assert small[1] + large[1] < 7 * 20 * 10**6, "the peaks, of which the second counts from the first"
