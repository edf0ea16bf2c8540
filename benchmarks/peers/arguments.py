"""The command line that the peers of the data plane share."""

from __future__ import annotations

import argparse


def parse(*, reads: bool) -> argparse.Namespace:
    """`tokenizer`, `text`, `out`, `sequence_length` and `processes`; with `reads` also the number of random reads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer")
    parser.add_argument("text")
    parser.add_argument("out")
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    if reads:
        parser.add_argument("--reads", type=int, default=2000)
    return parser.parse_args()
