import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmssl.data.batch import SequenceBatch, num_micro_batches, training_batches, validation_batches
from lmssl.data.cancel import Cancelled
from lmssl.data.ledger import Ledger
from lmssl.data.order import kept_position, permutation
from lmssl.data.stream import SequenceStream
from lmssl.data.units import list_units
from lmssl.errors import DataError
from lmssl.recipe.batches import BatchPlan, Ramp, plan_batches
from lmssl.recipe.data import JsonlCorpus

Open = Callable[..., SequenceStream]
BATCH, STEPS = 12, 4


def as_is(batch: SequenceBatch) -> SequenceBatch:
    return batch


def process_and_modules(batch: SequenceBatch) -> tuple[int, set[str]]:
    del batch
    return os.getpid(), {name.partition(".")[0] for name in sys.modules}


def fails(batch: SequenceBatch) -> SequenceBatch:
    """In the second step, whose batches loader processes make."""
    if batch.positions_B[0] < BATCH:
        return batch
    raise DataError("too blue", where=f"position {batch.positions_B[0]}", remedy="paint it")


def breaks(batch: SequenceBatch) -> SequenceBatch:
    raise ZeroDivisionError(f"at {batch.positions_B[0]}")


def dies(batch: SequenceBatch) -> SequenceBatch:
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch


def batches(stream: SequenceStream, prepare: Any = as_is, **settings: Any) -> Iterator[list[Any]]:
    defaults: dict[str, Any] = {
        "plan": BatchPlan.even(BATCH),
        "micro_batch_sequences": 4,
        "world_size": 1,
        "rank": 0,
        "start_step": 0,
        "num_steps": STEPS,
        "workers": 0,
    }
    return training_batches(stream, prepare=prepare, **{**defaults, **settings})


def rows(steps: list[list[SequenceBatch]]) -> dict[int, tuple[bytes, ...]]:
    """Content of every row by position."""
    found = {}
    for batch in itertools.chain.from_iterable(steps):
        for i, position in enumerate(batch.positions_B.tolist()):
            arrays = batch.ids_BT[i], batch.segments_BT[i], batch.offsets_BT[i], batch.num_bytes_B[i]
            if position >= 0:
                assert position not in found
                found[position] = tuple(array.tobytes() for array in arrays)
            else:
                assert not arrays[1].any() and not arrays[3]
    return found


@pytest.fixture
def stream(open_stream: Open, jsonl: Any) -> SequenceStream:
    return open_stream(jsonl("a", weight=0.7), jsonl("b", seed=1, weight=0.3))


def no_threads_left() -> bool:
    return not {thread.name for thread in threading.enumerate()} & {"prefetch", "build-ahead"}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_sequences", [1, 4, 5, 16])
def test_positions_hold_the_same_tokens_for_every_layout(
    stream: SequenceStream, world_size: int, micro_batch_sequences: int
) -> None:
    layout = {"world_size": world_size, "micro_batch_sequences": micro_batch_sequences}
    found: dict[int, tuple[bytes, ...]] = {}
    for rank in range(world_size):
        steps = list(batches(stream, rank=rank, **layout))
        count = num_micro_batches(BATCH, micro_batch_sequences, world_size)
        assert [len(step) for step in steps] == [count] * STEPS
        assert {batch.ids_BT.shape for step in steps for batch in step} == {(micro_batch_sequences, 64)}
        mine = rows(steps)
        assert not mine.keys() & found.keys()
        found |= mine
    assert sorted(found) == list(range(BATCH * STEPS))
    assert all(found[p][0] == stream.sequence(p).ids_T.tobytes() for p in found)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_growing_batches_read_the_positions_in_order(open_stream: Open, jsonl: Any, world_size: int) -> None:
    """From 3 to 12 sequences; also from the middle of the growth on, as a run that continues does."""
    corpora, skip = (jsonl("a", weight=0.7), jsonl("b", seed=1, weight=0.3)), [(5, 9), (40, 41)]
    plan = plan_batches(100 * 64, Ramp(3 * 64, 12 * 64, 50 * 64), ((0, 64),))
    stream, whole = open_stream(*corpora, skip=skip), open_stream(*corpora)
    sizes = [plan.num_sequences(step) for step in range(plan.num_steps)]
    assert sizes[0] == 3 and sizes[-1] == 12 and len(set(sizes)) == 4
    layout = {"world_size": world_size, "plan": plan, "micro_batch_sequences": 3, "num_steps": plan.num_steps}
    found: dict[int, tuple[bytes, ...]] = {}
    for rank in range(world_size):
        steps = list(batches(stream, rank=rank, **layout))
        assert [len(step) for step in steps] == [num_micro_batches(size, 3, world_size) for size in sizes]
        for number, step in enumerate(steps):
            begin = plan.first_position(number)
            wanted = {kept_position(k, skip) for k in range(begin, begin + sizes[number])}
            assert set(rows([step])) <= wanted
        middle = {**layout, "start_step": 5, "num_steps": plan.num_steps - 5}
        assert rows(list(batches(stream, rank=rank, workers=rank % 2, **middle))) == rows(steps[5:])
        found |= rows(steps)
    assert sorted(found) == [kept_position(k, skip) for k in range(plan.num_positions)]
    assert all(ids == whole.sequence(position).ids_T.tobytes() for position, (ids, *_) in found.items())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_skipped_positions_are_left_out_and_nothing_shifts(open_stream: Open, jsonl: Any, world_size: int) -> None:
    corpora = jsonl("a", weight=0.7), jsonl("b", seed=1, weight=0.3)
    whole, skip = open_stream(*corpora), [(0, 2), (7, 8), (20, 40), (40, 41)]
    stream = open_stream(*corpora, skip=skip)
    left_out = {position for start, end in skip for position in range(start, end)}
    wanted = [position for position in range(200) if position not in left_out][: BATCH * STEPS]
    found: dict[int, tuple[bytes, ...]] = {}
    for rank in range(world_size):
        layout = {"world_size": world_size, "rank": rank}
        steps = list(batches(stream, **layout))
        assert rows(steps) == rows(list(batches(stream, workers=rank % 2, **layout)))
        for number, step in enumerate(steps):
            mine = rows([step])
            assert set(mine) <= set(wanted[number * BATCH : (number + 1) * BATCH])
            assert mine == rows(list(batches(stream, start_step=number, num_steps=1, **layout)))
            found |= mine
    assert sorted(found) == wanted
    for position, (ids, *_) in found.items():
        assert ids == whole.sequence(position).ids_T.tobytes() == stream.sequence(position).ids_T.tobytes()
    assert stream.ledger_at(90).text() == whole.ledger_at(90).text()


def test_rows_go_where_the_module_says(stream: SequenceStream) -> None:
    (step,) = batches(stream, world_size=2, rank=1, micro_batch_sequences=4, num_steps=1, start_step=3)
    assert [batch.positions_B.tolist() for batch in step] == [[40, 41, 42, 43], [-1, -1, -1, -1]]


def test_loader_processes_and_resuming_change_nothing(stream: SequenceStream) -> None:
    whole = rows(list(batches(stream)))
    state = torch.get_rng_state()
    assert whole == rows(list(batches(stream, workers=1)))
    assert torch.equal(torch.get_rng_state(), state)
    first, second = batches(stream, num_steps=1), batches(stream, start_step=1, num_steps=STEPS - 1)
    assert whole == rows(list(first)) | rows(list(second))
    assert no_threads_left() and not multiprocessing.active_children()


def test_prepare_runs_in_a_loader_process_that_never_imports_transformers(stream: SequenceStream) -> None:
    first, second = (step[0] for step in batches(stream, process_and_modules, num_steps=2, workers=1))
    assert first[0] == os.getpid()  # while the other process starts
    process, modules = second
    assert process != os.getpid()
    assert "torch" in modules and not modules & {"transformers", "accelerate", "datasets"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_three_workers_over_a_ledger_from_the_disk(
    stream: SequenceStream, open_stream: Any, jsonl: Any, tmp_path: Path
) -> None:
    first = list(batches(stream))
    stream.ledger_at(STEPS * BATCH).save(tmp_path / "ledger.jsonl")
    later = {"start_step": STEPS, "num_steps": 2 * STEPS}
    expected = rows(first) | rows(list(batches(stream, **later)))
    corpora = jsonl("a", weight=0.7), jsonl("b", seed=1, weight=0.3)
    again = open_stream(*corpora, ledger=Ledger.load(tmp_path / "ledger.jsonl"))
    assert rows(list(batches(again, num_steps=3 * STEPS, workers=3))) == expected


SHARES = {2: (0.7, 0.3), 3: (0.5, 0.3, 0.2), 6: (0.35, 0.25, 0.15, 0.13, 0.08, 0.04)}


@pytest.mark.parametrize(("count", "bound"), [(2, 0.5), (3, 1.0), (6, 1.2)])
def test_shares_in_tokens_at_every_blocks_end(open_stream: Open, jsonl: Any, count: int, bound: float) -> None:
    """Padding, which stands where windows end alone, belongs to one corpus or another and widens the bound."""
    shares = SHARES[count]
    corpora = [jsonl(f"c{i}", 120, seed=i, weight=share) for i, share in enumerate(shares)]
    stream = open_stream(*corpora, packing="concat", validation=None, window_chunks=64)
    tokens, padding = np.zeros(count), 0
    block = stream.section.block_sequences
    steps = batches(stream, plan=BatchPlan.even(block), micro_batch_sequences=block, num_steps=12)
    for number, (batch,) in enumerate(steps, 1):
        for row, position in enumerate(batch.positions_B.tolist()):
            used = int((batch.segments_BT[row] > 0).sum())
            tokens[int(stream.order.locate(position)[0][1:])] += used
            padding += 64 - used
        off = np.abs(tokens - np.array(shares) * number * block * 64)
        assert off.max() <= bound * 64 + padding, (number, off / 64)
    assert 0 < padding < 0.02 * tokens.sum()


@pytest.mark.parametrize("workers", [0, 1])
def test_closing_early_leaves_nothing_behind(stream: SequenceStream, workers: int) -> None:
    running = batches(stream, num_steps=10**6, workers=workers)
    next(running)
    running.close()  # type: ignore[attr-defined]
    assert no_threads_left() and not multiprocessing.active_children()
    assert rows(list(batches(stream))).keys() == set(range(BATCH * STEPS))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_someone_else_cancels_ends_the_reading(stream: SequenceStream, workers: int) -> None:
    running = batches(stream, num_steps=10**6, workers=workers)
    next(running)
    stream.cancel.set()
    with pytest.raises(Cancelled):
        list(running)
    assert no_threads_left() and not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_arrive_whole(stream: SequenceStream, workers: int) -> None:
    with pytest.raises(DataError) as caught:
        list(batches(stream, fails, workers=workers))
    assert str(caught.value) == f"too blue\n  where:  position {BATCH}\n  remedy: paint it"
    assert no_threads_left() and not multiprocessing.active_children()


def test_an_error_of_prepare_is_raised_as_it_is(stream: SequenceStream) -> None:
    with pytest.raises(ZeroDivisionError, match="at 0"):
        next(batches(stream, breaks))
    assert no_threads_left()


def test_a_loader_process_that_dies(stream: SequenceStream) -> None:
    with pytest.raises(DataError, match="a loader process died"):
        list(batches(stream, dies, workers=1))
    assert no_threads_left() and not multiprocessing.active_children()


def with_a_bad_record(corpus: JsonlCorpus, rank: int) -> JsonlCorpus:
    """The corpus, the second record of one unit broken: that of a rank in the first epoch."""
    units = list_units(corpus, chunk_bytes=4096)
    (part,) = units[permutation(len(units), 7, "units", corpus.name, 0)[rank]].parts
    with open(str(corpus.path), "r+b") as file:
        file.seek(part.start)
        file.readline()
        file.write(b"oops")
    return corpus


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_input_far_ahead_stops_where_it_is_reached(open_stream: Open, jsonl: Any, workers: int) -> None:
    stream = open_stream(with_a_bad_record(jsonl(count=1200), -1), validation=None, max_bad_records=0)
    seen = 0
    with pytest.raises(DataError, match="more than 0 unreadable records; one of them: not JSON"):
        for _ in batches(stream, num_steps=10**6, workers=workers):
            seen += 1
    assert seen > 10
    assert no_threads_left() and not multiprocessing.active_children()


def test_building_ahead_says_why_it_stopped(open_stream: Open, jsonl: Any) -> None:
    lines: list[str] = []
    corpus = with_a_bad_record(jsonl(count=1200), 1)
    stream = open_stream(corpus, validation=None, max_bad_records=0, report=lines.append)
    running = batches(stream, plan=BatchPlan.even(1), num_steps=100)
    next(running)
    wait_for(lambda: bool(lines))
    assert lines[0].startswith("building ahead stopped: corpus 'tales' has more than 0 unreadable records")
    running.close()  # type: ignore[attr-defined]


def test_windows_are_built_ahead(stream: SequenceStream) -> None:
    running = batches(stream, plan=BatchPlan.even(1), num_steps=100)
    next(running)
    wait_for(lambda: all(len(stream.ledger.entries(corpus)) >= 2 for corpus in "ab"))
    running.close()  # type: ignore[attr-defined]
    # One position was read and a few more are prefetched, all in the first window of their corpus.
    assert {stream.address(position).window for position in range(8)} == {0}
    assert [len(stream.ledger.entries(corpus)) for corpus in "ab"] == [2, 2]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_batches_cover_the_split_once(stream: SequenceStream, world_size: int) -> None:
    split = stream.validation()[0]
    found: list[int] = []
    shapes = set()
    counts = set()
    for rank in range(world_size):
        mine = list(validation_batches(split, micro_batch_sequences=4, world_size=world_size, rank=rank, prepare=as_is))
        counts.add(len(mine))
        for batch in mine:
            shapes.add(batch.ids_BT.shape)
            for row, index in enumerate(batch.positions_B.tolist()):
                if index >= 0:
                    found.append(index)
                    assert np.array_equal(batch.ids_BT[row], split.sequence(index).ids_T)
    assert sorted(found) == list(range(split.num_sequences))
    assert shapes == {(4, 64)} and len(counts) == 1
    assert no_threads_left()


SCRIPT = """
import sys, time
from pathlib import Path
from lmssl.data.batch import training_batches
from lmssl.data.stream import SequenceStream
from lmssl.recipe.batches import BatchPlan
from lmssl.recipe.data import DataSection, JsonlCorpus
from lmssl.tokenizer.load import load_tokenizer

def sizes(batch):
    return batch.ids_BT.shape

if __name__ == "__main__":
    tokenizer, corpus, cache = sys.argv[1:]
    section = DataSection(sequence_length=64, mixture=(JsonlCorpus(name="a", kind="jsonl", path=corpus),))
    stream = SequenceStream.open(section, load_tokenizer(tokenizer), 1, Path(cache))
    for step in training_batches(stream, plan=BatchPlan.even(4), micro_batch_sequences=4, world_size=1, rank=0,
                                 start_step=0, num_steps=10**9, prepare=sizes, workers=1):
        print("step", flush=True)
        time.sleep(0.01)
"""


def alive_in_group(group: int) -> list[str]:
    """Processes of a group; the dead that nobody waited for do not count."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it ended meanwhile
        if int(process_group) == group and state != "Z":
            found.append(path.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_ctrl_c_leaves_no_process(tmp_path: Path, jsonl: Any, tokenizer: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tokenizer.path), jsonl().path, str(tmp_path / "cache")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == "step\n"
        os.killpg(child.pid, signal.SIGINT)
        child.stdout.read()
        errors = child.stderr.read()
        assert child.wait(timeout=30) == -signal.SIGINT
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
    wait_for(lambda: not alive_in_group(child.pid))
