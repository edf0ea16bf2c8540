import json
from pathlib import Path

import pytest

from lmssl.data.ledger import Ledger, LedgerEntry
from lmssl.data.order import Stage
from lmssl.errors import CheckpointError

STAGE = Stage(0, ("a", "b"), (2, 1), 8, (0, 0))


def entry(corpus: str, window: int, num_sequences: int) -> LedgerEntry:
    counts = dict.fromkeys(
        ("num_documents", "num_tokens", "num_bytes", "num_padding", "num_cut_documents", "num_bad"), 1
    )
    return LedgerEntry(corpus, 0, window, 2, num_sequences, "c", window + 1, 0, False, **counts)


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger([STAGE], {"data.packing": "concat"})
    for window, count in enumerate((3, 0, 5)):
        ledger.append(entry("a", window, count))
    ledger.append(entry("b", 0, 4))
    return ledger


def test_the_kth_sequence_is_found(ledger: Ledger) -> None:
    assert [ledger.find("a", k) for k in range(9)] == [
        (0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4), None
    ]  # fmt: skip
    assert ledger.find("c", 0) is None
    assert (ledger.num_sequences("a"), ledger.num_sequences("c")) == (8, 0)


def test_it_survives_the_disk(ledger: Ledger, tmp_path: Path) -> None:
    ledger.save(tmp_path / "ledger.jsonl")
    again = Ledger.load(tmp_path / "ledger.jsonl")
    assert again.fingerprint == ledger.fingerprint
    assert (again.stages, again.settings) == (ledger.stages, ledger.settings)
    assert again.entries("a") == ledger.entries("a") and again.find("b", 3) == (0, 3)


def test_a_ledger_from_before_filters_counts_none_dropped(ledger: Ledger, tmp_path: Path) -> None:
    ledger.save(tmp_path / "ledger.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    old = [{key: value for key, value in line.items() if not key.startswith("num_dropped")} for line in lines]
    assert old[1:] != lines[1:]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    again = Ledger.load(tmp_path / "old.jsonl")
    assert again.fingerprint == ledger.fingerprint
    assert [found.num_dropped for found in again.entries("a")] == [0, 0, 0]


def test_the_beginning_of_a_ledger(ledger: Ledger) -> None:
    assert [len(ledger.up_to({"a": a, "b": 0}).entries("a")) for a in (0, 1, 3, 4, 8)] == [0, 1, 1, 3, 3]
    assert ledger.up_to({"a": 8, "b": 4}).fingerprint == ledger.fingerprint
    assert ledger.up_to({"a": 3, "b": 4}).fingerprint != ledger.fingerprint


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]\n", '{"format": 2, "stages": [], "settings": {}}', '{"format": 1, "stages": [], "settings": {}}\n{}'],
)
def test_what_is_not_a_ledger(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger.jsonl").write_text(text)
    with pytest.raises(CheckpointError, match="the ledger cannot be read"):
        Ledger.load(tmp_path / "ledger.jsonl")


def test_a_missing_ledger(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        Ledger.load(tmp_path / "ledger.jsonl")


def test_what_is_read_of_a_window_follows_from_the_stages(ledger: Ledger, tmp_path: Path) -> None:
    """Another length cuts the window of 5 sequences after 2 of them; where a window ends anyway, none is cut."""
    for window, count in enumerate((2, 6), 3):
        ledger.append(entry("a", window, count))
    whole = [range(3), range(3, 3), range(3, 8), range(8, 10), range(10, 16)]
    assert [ledger.read("a", number) for number in range(5)] == whole
    later = [Stage(7, ("a", "b"), (2, 1), 8, (5, 2), 16), Stage(10, ("a", "b"), (2, 1), 8, (7, 3), None)]
    ledger.stages = (STAGE, *later)
    cut = [range(3), range(3, 3), range(3, 5), range(5, 7), range(7, 13)]
    assert [ledger.read("a", number) for number in range(5)] == cut
    assert [ledger.is_cut("a", number) for number in range(5)] == [False, False, True, False, False]
    assert [ledger.sequence_length("a", k) for k in (0, 4, 5, 6, 7, 99)] == [None, None, 16, 16, None, None]
    assert [ledger.find("a", k) for k in (4, 5, 6, 7)] == [(2, 1), (3, 0), (3, 1), (4, 0)]
    assert ledger.read("b", 0) == range(2)
    ledger.save(tmp_path / "ledger.jsonl")
    assert [Ledger.load(tmp_path / "ledger.jsonl").read("a", number) for number in range(5)] == cut
    ledger.stages = (STAGE,)
    assert [ledger.read("a", number) for number in range(5)] == whole
