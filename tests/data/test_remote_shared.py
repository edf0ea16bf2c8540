"""A folder of downloads that several processes use at once, and file systems that lock in another way."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmssl.data import remote as module
from lmssl.data.remote import RemoteFiles, RemotePath

BLOCK_BYTES = 1 << 14
NUM_BLOCKS = 60
READ = """
import sys
from pathlib import Path
from lmssl.data.remote import RemoteFiles

folder, max_bytes, block_bytes, own, expected = sys.argv[1:]
files = RemoteFiles(Path(folder), int(max_bytes), block_bytes=int(block_bytes))
(path,) = files.list_files(own, lambda name: True)
print("ready", flush=True)
sys.stdin.readline()
with files.open(path) as file:
    assert file.read() == Path(expected).read_bytes()
"""


@pytest.fixture
def files(tmp_path: Path) -> RemoteFiles:
    return RemoteFiles(tmp_path / "remote", 10 * BLOCK_BYTES, block_bytes=BLOCK_BYTES)


def source(path: Path, num_blocks: int) -> Path:
    """A file of random bytes."""
    path.write_bytes(os.urandom(num_blocks * BLOCK_BYTES))
    return path


def one(files: RemoteFiles, path: Path) -> RemotePath:
    (found,) = files.list_files(path.as_uri(), lambda name: True)
    return found


def read(path: RemotePath) -> bytes:
    with path.files.open(path) as file:
        return file.read()


def kept(files: RemoteFiles) -> list[Path]:
    return [path for path in files.folder.iterdir() if not path.name.startswith(".lock-")]


@pytest.mark.parametrize("max_blocks", [10, 10**6])
@pytest.mark.parametrize("num_files", [1, 4])
def test_processes_share_a_folder(tmp_path: Path, max_blocks: int, num_files: int) -> None:
    paths = [source(tmp_path / f"{number}.bin", NUM_BLOCKS) for number in range(num_files)]
    folder, running = tmp_path / "remote", []
    for number in range(4):
        path = paths[number % num_files]
        options = [str(folder), str(max_blocks * BLOCK_BYTES), str(BLOCK_BYTES), path.as_uri(), str(path)]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        running.append(subprocess.Popen([sys.executable, "-c", READ, *options], text=True, **pipes))
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    blocks = [path for path in folder.iterdir() if not path.name.startswith(".lock-")]
    assert len(blocks) == min(max_blocks, num_files * NUM_BLOCKS)
    assert all(path.stat().st_size == BLOCK_BYTES and not path.name.startswith(".part-") for path in blocks)


def test_a_file_that_vanishes_while_room_is_made(tmp_path: Path, files: RemoteFiles) -> None:
    files.folder.mkdir()
    (files.folder / "listed").symlink_to(tmp_path / "gone")  # what listing finds and looking does not
    path = source(tmp_path / "a", 1)
    assert read(one(files, path)) == path.read_bytes()


def test_what_another_has_deleted_counts_as_room(
    tmp_path: Path, files: RemoteFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = replace(files, max_bytes=2 * BLOCK_BYTES)
    read(one(files, source(tmp_path / "a", 2)))
    first, second = kept(files)
    os.utime(first, ns=(0, 0))
    remove = module._remove_unused

    def late(path: Path) -> bool:
        path.unlink()
        return remove(path)

    monkeypatch.setattr(module, "_remove_unused", late)
    read(one(files, source(tmp_path / "b", 1)))
    assert second in kept(files) and first not in kept(files)


def test_a_download_left_by_a_dead_process_makes_room(tmp_path: Path, files: RemoteFiles) -> None:
    files = replace(files, max_bytes=BLOCK_BYTES)
    files.folder.mkdir()
    (files.folder / ".part-dead").write_bytes(bytes(BLOCK_BYTES))
    read(one(files, source(tmp_path / "a", 1)))
    assert [path.name.endswith("-a") for path in kept(files)] == [True]


def test_room_is_made_where_exclusive_locks_take_a_writer(
    tmp_path: Path, files: RemoteFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock

    def as_on_nfs(file: Any, operation: int) -> None:
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if (operation & fcntl.LOCK_EX and mode == os.O_RDONLY) or (operation & fcntl.LOCK_SH and mode == os.O_WRONLY):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    path = source(tmp_path / "a", 15)
    assert read(one(files, path)) == path.read_bytes()
    assert len(kept(files)) == 10
