"""Saves that are killed, run out of disk, or meet a folder they may not write: one valid checkpoint always remains."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from faulty_runs import own_mounts
from lmssl import checkpoint
from runs import assert_equal_runs, small_recipe, write_recipe

SAVE = """
import json, os, resource, signal, sys, time
from pathlib import Path
import torch
from lmssl.checkpoint import Keep, Saver, folder, keep, protocol
from lmssl.errors import CheckpointError

run, step, fault = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if fault.get("kill_at_sync"):
    sync, count = os.fsync, 0
    def counted(descriptor):
        global count
        count += 1
        sync(descriptor) if count < fault["kill_at_sync"] else die()
    os.fsync = counted
if fault.get("kill") == "before rename":
    Path.rename = die
if fault.get("kill") == "after rename":
    rename = Path.rename
    Path.rename = lambda path, target: (rename(path, target), die())
if fault.get("kill") == "before prune":
    protocol.prune = die
if fault.get("kill") == "in prune":
    rmtree = folder.shutil.rmtree
    folder.shutil.rmtree = lambda path, **_: die() if "removed" in path.name and path.exists() else rmtree(path, **_)
if fault.get("file_bytes"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (fault["file_bytes"], fault["file_bytes"]))
saver = Saver(run, keep=Keep(last=2), asynchronous=fault.get("asynchronous", True), clock=time.monotonic, report=print)
named = {"a": torch.full((fault.get("numbers", 1000),), float(step)), "b": torch.ones(3)}
groups = {"model": named, "optim": {f"exp_avg/{name}": t for name, t in named.items()}}
try:
    saver.save(step, tensors=groups, texts={"state.json": json.dumps({"step": step}), "recipe.yaml": "{}"})
    saver.close()
except CheckpointError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def save(run: Path, step: int, **fault: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SAVE, str(run), str(step), json.dumps(fault)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def saved(run: Path, *steps: int) -> None:
    """Saves without faults, in this process."""
    for step in steps:
        saver = checkpoint.Saver(run, keep=checkpoint.Keep(last=2), clock=lambda: 0.0, report=lambda _: None)
        named = {"a": torch.full((1000,), float(step)), "b": torch.ones(3)}
        saver.save(step, tensors={"model": named}, texts={"state.json": json.dumps({"step": step})})
        saver.close()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.checkpoints_path(run).iterdir())


def found_step(run: Path) -> int:
    """The checkpoint that a start would use, which must be silent about folders that never became one."""
    said: list[str] = []
    found = checkpoint.find_latest(run, said.append)
    assert found is not None and said == []
    assert torch.equal(found.tensors("model")["a"], torch.full((1000,), float(found.step)))
    return found.step


# Files: model, optim, two texts, the manifest; then the folder.
@pytest.mark.parametrize("number", range(1, 7))
def test_killed_at_each_file_the_earlier_one_is_found_and_the_rest_swept(tmp_path: Path, number: int) -> None:
    saved(tmp_path, 1, 2)
    done = save(tmp_path, 3, kill_at_sync=number)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert ".tmp-step-00000003" in names(tmp_path)
    assert found_step(tmp_path) == 2
    saved(tmp_path, 3)  # the next start sweeps, and the save is made again
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert found_step(tmp_path) == 3


@pytest.mark.parametrize(
    ("kill", "found"), [("before rename", 2), ("after rename", 3), ("before prune", 3), ("in prune", 3)]
)
def test_killed_around_the_rename_and_the_prune(tmp_path: Path, kill: str, found: int) -> None:
    saved(tmp_path, 1, 2)
    assert save(tmp_path, 3, kill=kill).returncode == -signal.SIGKILL
    assert found_step(tmp_path) == found
    assert [path.name for path in checkpoint.step_folders(tmp_path) if checkpoint.validate(path)] == []
    saved(tmp_path, 4)
    assert names(tmp_path) == [f"step-{step:08d}" for step in ((2, 4) if found == 2 else (3, 4))]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_that_outgrows_its_limit_leaves_the_earlier_one(tmp_path: Path, asynchronous: bool) -> None:
    """A quota, as the system enforces it on any disk and for any user."""
    saved(tmp_path, 1)
    done = save(tmp_path, 2, file_bytes=2000, asynchronous=asynchronous)
    assert done.returncode == 6, done.stderr
    assert "the checkpoint of step 2 could not be written" in done.stderr and "File too large" in done.stderr
    assert "the checkpoint of step 1 is intact" in done.stderr
    assert names(tmp_path) == ["step-00000001"]


MOUNTED = 'mount -t tmpfs -o size={size} tmpfs "$1" && shift && exec "$@"'


def on_small_disk(folder: Path, size: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in a mount namespace of its own, where a folder is a disk of `size`; gone when it ends."""
    through = own_mounts(MOUNTED.format(size=size), str(folder))
    return subprocess.run([*through, *command], capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = on_small_disk(folder, "1m", ["true"])
    except FileNotFoundError:
        pytest.skip(
            "there is no unshare here; RLIMIT_FSIZE tests what follows a failed write, nothing a full disk before it"
        )
    if mounted.returncode:
        pytest.skip(f"no small disk may be mounted here: {mounted.stderr.strip()}")
    return folder


FULL = """
import os, subprocess, sys
from pathlib import Path
script, run, mode = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
def save(step, fault="{}"):
    return subprocess.run([sys.executable, "-c", script, str(run), str(step), fault], capture_output=True, text=True)
assert save(1).returncode == 0
if mode == "known":    # the disk is full before
    (run / "ballast").write_bytes(bytes(300_000))
else:                  # somebody else fills it while the save is under way: the preflight saw enough
    script = script.replace("saver = Saver(", "protocol.free_bytes = lambda _: 10**12; saver = Saver(", 1)
done = save(2, '{"numbers": 60000}')
from lmssl import checkpoint
assert checkpoint.find_step(run, None).step == 1
print(done.returncode, sorted(p.name for p in checkpoint.checkpoints_path(run).iterdir()))
print(done.stderr)
(run / "ballast").unlink(missing_ok=True)
assert save(3).returncode == 0 and checkpoint.find_step(run, None).step == 3
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["known", "sudden"])
def test_a_full_disk_leaves_the_earlier_one_and_a_later_save_works(small_disk: Path, mode: str) -> None:
    done = on_small_disk(small_disk, "400k", [sys.executable, "-c", FULL, SAVE, str(small_disk), mode])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 ['step-00000001']"), done.stdout
    expected = "a checkpoint needs 480,0" if mode == "known" else "No space left on device"
    assert expected in done.stdout and "the checkpoint of step 1 is intact" in done.stdout


RANKS = """
import json, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from lmssl.checkpoint import Keep, Saver, owners, protocol
from lmssl.errors import CheckpointError
from lmssl.train.saving import GlooMeeting

run, fault = Path(sys.argv[1]), sys.argv[2]
rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=f"file://{run}/meeting", rank=rank, world_size=num_ranks)
if fault == "disk" and rank == 1:
    def full(path, named):
        raise OSError(28, "No space left on device", str(path))
    protocol.write_tensors = full
if fault == "killed" and rank == 1:
    protocol.write_tensors = lambda path, named: os.kill(os.getpid(), 9)
saver = Saver(run, keep=Keep(last=2), asynchronous=True, clock=time.monotonic, report=lambda _: None, rank=rank,
              num_ranks=num_ranks, group=GlooMeeting(num_ranks))
sizes = {f"w{i}": 1000 + i for i in range(9)}
mine = {name: torch.full((sizes[name],), 2.0) for name, owner in owners(sizes, num_ranks).items() if owner == rank}
saver.save(2, tensors={"model": mine}, texts={"state.json": "{}"} if rank == 0 else {})
total = torch.ones(())
for _ in range(50):  # training goes on, in the group of all, while threads meet in theirs
    dist.all_reduce(total)
    total /= num_ranks
try:
    saver.close()
except CheckpointError as error:
    (run / f"rank{rank}.txt").write_text(str(error))
    sys.exit(error.exit_code)
dist.destroy_process_group()
"""


def two_ranks(run: Path, fault: str) -> list[int]:
    """Saves a checkpoint by two processes that meet over gloo; their exit codes."""
    environment = {**os.environ, "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", RANKS, str(run), fault]
    ranks = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(2)]
    try:
        return [rank.wait(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_while_they_train(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    assert two_ranks(tmp_path, "none") == [0, 0]
    found = checkpoint.find_step(tmp_path, None)
    assert found.step == 2 and len(found.tensors("model")) == 9
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= set(found.manifest["files"])


@pytest.mark.slow
def test_a_disk_that_fails_one_process_fails_both(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    assert two_ranks(tmp_path, "disk") == [6, 6]
    told = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert "rank 1: [Errno 28] No space left on device" in told[0] and "step 1 is intact" in told[0]
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.slow
def test_a_process_killed_in_a_save_fails_the_other(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    survivor, killed = two_ranks(tmp_path, "killed")
    assert killed == -signal.SIGKILL and survivor != 0
    assert names(tmp_path) == ["step-00000001"] and found_step(tmp_path) == 1


READ_ONLY = """
import subprocess, sys
script, run = sys.argv[1], sys.argv[2]
def save(step):
    return subprocess.run([sys.executable, "-c", script, run, str(step), "{}"], capture_output=True, text=True)
assert save(1).returncode == 0
subprocess.run(["mount", "-o", "remount,ro", run], check=True)
done = save(2)
print(done.returncode, done.stderr)
"""


@pytest.mark.slow
def test_a_disk_that_became_read_only_is_named(small_disk: Path) -> None:
    """As the system does with a disk that makes errors; not even root may write there."""
    done = on_small_disk(small_disk, "400k", [sys.executable, "-c", READ_ONLY, SAVE, str(small_disk)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 ") and "Read-only file system" in done.stdout, done.stdout
    assert "the checkpoint of step 1 is intact" in done.stdout and "fix permissions" in done.stdout


def test_checkpoints_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    done = save(tmp_path, 2)
    assert done.returncode == 6 and "File exists" in done.stderr and "checkpoints" in done.stderr
    assert (tmp_path / "checkpoints").read_text() == "mine"


TRAIN = """
import json, os, sys, time
from lmssl.checkpoint import protocol
from lmssl.cli import main
recipe, seconds, begun = sys.argv[1], float(sys.argv[2]), sys.argv[3]
write = protocol.write_tensors
def slow(path, named):
    open(begun, "a").close()
    time.sleep(seconds)
    return write(path, named)
protocol.write_tensors = slow
sys.exit(main(["train", recipe]))
"""


class Training:
    """`lmssl train` in a process whose saves take longer, or meet a quota."""

    def __init__(self, recipe: Path, *, seconds: float = 0.0, file_bytes: int | None = None) -> None:
        self.begun, self._said = recipe.with_suffix(".begun"), recipe.with_suffix(".log")
        self.begun.unlink(missing_ok=True)

        def limit() -> None:
            if file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

        command = [sys.executable, "-c", TRAIN, str(recipe), str(seconds), str(self.begun)]
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=said, preexec_fn=limit)

    def end(self) -> tuple[int, str]:
        """Exit code, and what it said."""
        try:
            self.process.wait(280)
        finally:
            self.process.kill()
        return self.process.returncode, self._said.read_text(encoding="utf-8")

    def signal_in_a_save(self, how: signal.Signals) -> None:
        """Wait until a save has begun to write, then send a signal."""
        deadline = time.monotonic() + 200
        while not self.begun.exists() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        self.process.send_signal(how)


def recipe_of(tmp_path: Path, text_folder: Path, name: str, **changes: Any) -> Path:
    changes = {"checkpoint.every_steps": 4, "data.validation": None, **changes}
    recipe = small_recipe(text_folder, tmp_path / name, tmp_path / "cache", steps=12, **changes)
    return write_recipe(tmp_path / f"{name}.yaml", recipe)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_signal_during_a_save_leaves_a_valid_checkpoint_of_the_last_step(tmp_path: Path, text_folder: Path) -> None:
    code, said = Training(recipe_of(tmp_path, text_folder, "whole")).end()
    assert code == 0, said
    for how in (signal.SIGTERM, signal.SIGINT):
        name = how.name.lower()
        recipe, run = recipe_of(tmp_path, text_folder, name), tmp_path / name
        training = Training(recipe, seconds=1.0)
        training.signal_in_a_save(how)
        code, said = training.end()
        assert code == 75, said
        problems: list[str] = []
        found = checkpoint.find_latest(run, problems.append)
        assert found is not None and problems == [] and 4 <= found.step < 12
        assert not [name for name in names(run) if name.startswith(".tmp-")]
        code, said = Training(recipe).end()
        assert code == 0, said
        assert_equal_runs(tmp_path / "whole", run)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_meets_a_quota_stops_with_what_it_saved(tmp_path: Path, text_folder: Path) -> None:
    recipe = recipe_of(tmp_path, text_folder, "run")
    code, said = Training(recipe).end()
    assert code == 0, said
    checkpoint.discard_after(tmp_path / "run", 8)
    size = (checkpoint.find_step(tmp_path / "run", 8).path / "optim.safetensors").stat().st_size
    code, said = Training(recipe, file_bytes=size - 1000).end()
    assert code == 6, said
    assert "the checkpoint of step 12 could not be written" in said and "File too large" in said
    assert "the checkpoint of step 8 is intact" in said
    assert names(tmp_path / "run") == ["step-00000008"]
