"""`lmssl prepare`: everything is built once, whoever builds it and however often it is stopped."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard
from rich.console import Console

from lmssl import prepare as prepare_module
from lmssl.cli import main
from lmssl.data.cache import LOCKS_ARE_MISSING, Claim
from lmssl.data.corpus import list_units
from lmssl.data.stream import SequenceStream
from lmssl.errors import DataError
from lmssl.prepare import Prepared, build_units, prepare
from lmssl.recipe.load import load_recipe
from lmssl.recipe.sections import Recipe
from lmssl.tokenizer.load import load_tokenizer
from tests.runs import small_recipe, write_recipe

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}
LAUNCHERS["accelerate"] += ["--main_process_port", "29617"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recipe over 40 files that make about as many chunks."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        lines = [f"file {i} line {j} says {i * j % 97} and nothing else\n\n" for j in range(60)]
        (folder / f"{i:02}.txt").write_text("".join(lines), encoding="utf-8")
    recipe = small_recipe(folder, tmp_path / "run", tmp_path / "cache")
    recipe["data"]["chunk_bytes"] = 2048
    return write_recipe(tmp_path / "recipe.yaml", recipe)


def run(recipe: Recipe, *, rank: int = 0, world_size: int = 1, workers: int = 1) -> Prepared:
    lines: list[str] = []
    found = prepare(
        recipe,
        rank=rank,
        world_size=world_size,
        workers=workers,
        clock=time.monotonic,
        report=lines.append,
        console=None,
    )
    assert lines == []
    return found


def chunks(recipe: Recipe) -> dict[str, int]:
    """Chunk folders of the cache, with the time at which each was finished."""
    return {
        str(file.parent): file.stat().st_mtime_ns for file in Path(recipe.data.cache).glob("chunks/*/[!.]*/meta.json")
    }


def test_everything_is_built_once(path: Path) -> None:
    recipe = load_recipe(path).recipe
    first = run(recipe)
    assert first.num_built == first.num_chunks == len(chunks(recipe)) > 20
    assert first.built_tokens == first.num_tokens > 0
    there = chunks(recipe)
    again = run(recipe)
    assert (again.num_built, again.num_chunks, again.num_tokens) == (0, first.num_chunks, first.num_tokens)
    assert chunks(recipe) == there


def test_a_run_finds_what_was_prepared(path: Path) -> None:
    recipe = load_recipe(path).recipe
    found = run(recipe, workers=2)
    there = chunks(recipe)
    tokenizer = load_tokenizer(Path(recipe.tokenizer.path))
    stream = SequenceStream.open(recipe.data, tokenizer, seed=1, cache_dir=Path(recipe.data.cache))
    stream.num_sequences_per_epoch()
    held_out = sum(split.num_bytes for split in stream.validation()) if recipe.data.validation else 0
    assert stream.totals().num_bytes + held_out <= found.num_bytes
    assert chunks(recipe) == there


@pytest.mark.parametrize("processes", [False, True])
def test_validation_sets_are_built_as_far_as_training_reads_them(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: bool
) -> None:
    if processes:
        monkeypatch.setattr(prepare_module, "_MIN_POOL_BYTES", 0)
    lines = [json.dumps({"text": f"question {i} of the exam, with {i * i} words"}) for i in range(4000)]
    (tmp_path / "exam.jsonl").write_text("\n".join(lines), encoding="utf-8")
    recipe = json.loads(path.read_text(encoding="utf-8"))
    sets = [{"name": "exam", "kind": "jsonl", "path": str(tmp_path / "exam.jsonl")}]
    sets.append({"name": "other", "kind": "text", "path": str(tmp_path / "text" / "00.txt"), "section_bytes": 256})
    counts = {}
    for name, validation in (("none", None), ("sets", {"ratio": 0.1, "tokens": 5000, "sets": sets})):
        recipe["data"] |= {"validation": validation, "cache": str(tmp_path / name)}
        loaded = load_recipe(write_recipe(tmp_path / f"{name}.yaml", recipe)).recipe
        counts[name] = run(loaded, workers=2)
        assert counts[name].num_built == counts[name].num_chunks == len(chunks(loaded))
        assert counts[name].built_tokens == counts[name].num_tokens
    there = chunks(loaded)
    all_chunks = len(lines) * 40 // recipe["data"]["chunk_bytes"]
    assert 3 <= counts["sets"].num_chunks - counts["none"].num_chunks < all_chunks / 2
    tokenizer = load_tokenizer(Path(loaded.tokenizer.path))
    stream = SequenceStream.open(loaded.data, tokenizer, seed=loaded.data_seed, cache_dir=Path(loaded.data.cache))
    assert [split.num_tokens > 0 for split in stream.validation_sets()] == [True, True]
    stream.validation()
    assert chunks(loaded) == there
    again = run(loaded)
    assert (again.num_built, again.num_chunks) == (0, len(there))


def test_a_misnamed_validation_set_stops_before_the_work(path: Path, tmp_path: Path) -> None:
    (tmp_path / "exam.jsonl").write_text('{"body": "x"}\n', encoding="utf-8")
    recipe = json.loads(path.read_text(encoding="utf-8"))
    sets = [{"name": "exam", "kind": "jsonl", "path": str(tmp_path / "exam.jsonl")}]
    recipe["data"]["validation"] = {"ratio": 0.1, "sets": sets}
    loaded = load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)).recipe
    with pytest.raises(DataError, match="body"):
        run(loaded)
    assert chunks(loaded) == {}


BERT = {"kind": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"kind": "t5", "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2}
INFILLING = {"rate": 0.5, "prefix": "<|fim_prefix|>", "middle": "<|fim_middle|>", "suffix": "<|no such|>"}


@pytest.mark.parametrize(
    ("code", "names", "changes"),
    [
        (4, "no mask token", {"objective": {"kind": "masked"}, "model": BERT, "data.cls": False, "data.sep": False}),
        (3, "no cls token", {"data.cls": True, "data.eos": False}),
        (4, "<extra_id_0>", {"objective": {"kind": "span"}, "model": T5}),
        (3, "'<|no such|>'", {"data.fill_in_the_middle": INFILLING}),
    ],
)
def test_a_tokenizer_that_training_would_refuse_stops_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, names: str, changes: dict[str, Any]
) -> None:
    (tmp_path / "a.txt").write_text("some words and nothing else\n", encoding="utf-8")
    recipe = small_recipe(tmp_path, tmp_path / "run", tmp_path / "cache", **changes)
    file = write_recipe(tmp_path / "recipe.yaml", recipe)
    assert main(["prepare", str(file)]) == code
    assert names in capsys.readouterr().err
    assert chunks(load_recipe(file).recipe) == {}


def test_ranks_share_the_work(path: Path) -> None:
    recipe = load_recipe(path).recipe
    environment = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lmssl", "prepare", str(path), "--workers", "1"]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert said[1] == ""
    assert f"{len(chunks(recipe))} chunks" in said[0]
    assert not list(Path(recipe.data.cache).rglob(".tmp-*"))
    assert run(recipe).num_built == 0


def test_ranks_share_one_file_that_is_read_in_order(path: Path, tmp_path: Path) -> None:
    """Each passes over what the other has in work; otherwise it would wait for the first chunk."""
    text = "".join(json.dumps({"text": f"record {i} of {i % 7} words " * (i % 40)}) + "\n" for i in range(400))
    (tmp_path / "one.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    recipe = json.loads(path.read_text(encoding="utf-8"))
    recipe["data"]["mixture"] = [{"name": "packed", "kind": "jsonl", "path": str(tmp_path / "one.jsonl.zst")}]
    loaded = load_recipe(write_recipe(tmp_path / "packed.yaml", recipe)).recipe
    settings = prepare_module._Settings(prepare_module.find(loaded.tokenizer.path), loaded.data)
    tokenizer = load_tokenizer(settings.tokenizer)
    units = list_units(loaded.data.mixture[0], chunk_bytes=loaded.data.chunk_bytes)
    one, two = (settings.open(print, tokenizer, threads=1) for _ in range(2))
    held = one.claim(units[0], 0)
    assert isinstance(held, Claim)
    ahead = build_units(two, units, threads=1)
    counts = [next(ahead)[1] for _ in range(3)]
    assert two.num_built == 3 == len(chunks(loaded))
    held.build()
    counts += [prepared for _, prepared in ahead]
    total = sum(counts, Prepared())
    assert total.num_chunks == len(chunks(loaded)) == total.num_built + 1 > 4
    assert total.num_documents == 390, "of 400 records ten are empty"
    assert run(loaded).num_built == 0


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launched_ranks_share_the_work(path: Path, launcher: str) -> None:
    recipe = load_recipe(path).recipe
    command = [sys.executable, *LAUNCHERS[launcher], "-m", "lmssl", "prepare", str(path), "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith(f"{len(chunks(recipe))} chunks, ")]
    assert done.stdout.count(" chunks built by this process group") == 1, "rank 0 alone speaks"
    assert not list(Path(recipe.data.cache).rglob(".tmp-*"))
    after = run(recipe)
    assert (after.num_built, after.num_chunks) == (0, len(chunks(recipe)))


def test_progress_is_a_line_every_ten_seconds(path: Path) -> None:
    """By a clock that each look moves on by a second: there is one look a chunk."""
    recipe, ticks, console = load_recipe(path).recipe, itertools.count(), Console(record=True, file=io.StringIO())
    found = prepare(
        recipe, rank=0, world_size=1, workers=1, clock=lambda: float(next(ticks)), report=print, console=console
    )
    lines = console.export_text().splitlines()
    assert len(lines) == found.num_chunks // 10 > 2
    shown = [re.fullmatch(r"tokenizing +(\d+)%  (\d+\.\d\d) M tokens/s  eta (\d+) s", line) for line in lines]
    shares, rates, left = zip(*((float(value) for value in match.groups()) for match in shown if match), strict=True)
    assert len(shares) == len(lines) and list(shares) == sorted(shares)
    for number, (share, seconds) in enumerate(zip(shares, left, strict=True), 1):
        assert seconds == pytest.approx(10 * number * (100 - share) / share, abs=3)
    # Chunks are about equal, and so are the tokens of ten of them: what a second brings is what all bring in a second.
    assert rates == pytest.approx([found.built_tokens / found.num_chunks / 1e6] * len(rates), abs=0.006)


def test_a_rank_begins_at_its_own_share(path: Path) -> None:
    recipe = load_recipe(path).recipe
    assert run(recipe, rank=1, world_size=2).num_built == run(recipe, rank=0, world_size=2).num_chunks


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_stopping_loses_at_most_the_chunk_in_work(path: Path, signal_number: int) -> None:
    recipe = load_recipe(path).recipe
    command = [sys.executable, "-m", "lmssl", "prepare", str(path), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while len(chunks(recipe)) < 3 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal_number)
    complaint = process.communicate(timeout=60)[1]
    if signal_number == signal.SIGINT and process.returncode:
        assert "Traceback" not in complaint
        assert not list(Path(recipe.data.cache).rglob(".tmp-*"))
    there = chunks(recipe)
    after = run(recipe)
    assert after.num_built == after.num_chunks - len(there)
    assert chunks(recipe).items() >= there.items()
    assert len(list(Path(recipe.data.cache).rglob(".tmp-*"))) <= 1


KILLED = """
import multiprocessing, sys, time
from lmssl import prepare as module
from lmssl.cli import main

def build_units(cache, units, threads):
    children = multiprocessing.active_children()
    if len(children) == 3:
        print(*(child.pid for child in children), flush=True)
        time.sleep(120)
    time.sleep(0.2)
    return iter(())

module._MIN_POOL_BYTES = 0
module.build_units = build_units  # in this process alone: it waits while its workers build
main(["prepare", sys.argv[1], "--workers", "4"])
"""


def is_running(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_do_not_outlive_a_killed_main_process(path: Path) -> None:
    recipe = load_recipe(path).recipe
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = process.stdout.readline().split()
    end = time.monotonic() + 60
    while len(chunks(recipe)) < 3 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert len(workers) == 3 and all(map(is_running, workers))
    process.kill()
    process.wait()
    end = time.monotonic() + 5
    while any(map(is_running, workers)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not [pid for pid in workers if is_running(pid)]
    process.stdout.close()
    there = chunks(recipe)
    after = run(recipe)
    assert after.num_built == after.num_chunks - len(there) > 0
    assert run(recipe).num_built == 0


def test_bad_records_beyond_the_limit_stop_it(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(4):
        good = json.dumps({"text": f"line {i} is good"})
        (folder / f"{i}.jsonl").write_text(f"{good}\nnot json\n{good}\n", encoding="utf-8")
    recipe = small_recipe(folder, tmp_path / "run", tmp_path / "cache")
    recipe["data"]["mixture"] = [{"name": "lines", "kind": "jsonl", "path": str(folder)}]
    recipe["data"] |= {"max_bad_records": 3, "chunk_bytes": 1024}
    loaded = load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)).recipe
    with pytest.raises(DataError, match="more than 3 unreadable records"):
        run(loaded)
    recipe["data"]["max_bad_records"] = 4
    assert run(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)).recipe).num_bad == 4


def test_zero_workers_are_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(path), "--workers", "0"]) == 2
    assert "--workers" in capsys.readouterr().err


def test_workers_leave_it_to_the_main_process_that_locks_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (f"{LOCKS_ARE_MISSING} /cache", "another line"):
        prepare_module._say_in_worker(line)
    assert capsys.readouterr().out == "another line\n"


def content(recipe: Recipe) -> dict[str, bytes]:
    """Every file of every chunk."""
    root = Path(recipe.data.cache) / "chunks"
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.mark.parametrize("processes", [False, True])
def test_threads_and_processes_build_what_one_thread_builds(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: bool
) -> None:
    if processes:
        monkeypatch.setattr(prepare_module, "_MIN_POOL_BYTES", 0)
    text = "".join(json.dumps({"text": f"record {i} of {i % 7} words " * (i % 40)}) + "\n" for i in range(400))
    (tmp_path / "one.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    packed = {"name": "packed", "kind": "jsonl", "path": str(tmp_path / "one.jsonl.zst"), "weight": 1}
    recipe = json.loads(path.read_text(encoding="utf-8"))
    recipe["data"]["mixture"] = [{**recipe["data"]["mixture"][0], "weight": 1}, packed]
    loaded = {}
    for name in ("alone", "many"):
        recipe["data"]["cache"] = str(tmp_path / name)
        loaded[name] = load_recipe(write_recipe(tmp_path / f"{name}.yaml", recipe)).recipe
    alone, many = run(loaded["alone"], workers=1), run(loaded["many"], workers=3)
    assert alone == many and alone.num_built > 60
    assert content(loaded["alone"]) == content(loaded["many"])
