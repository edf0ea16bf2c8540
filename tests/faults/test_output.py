"""Output that nobody reads, and files that cannot be written: a run says less, and trains to its end."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from faulty_runs import faulty_run, interrupt, own_mounts
from lmssl import checkpoint
from runs import metrics, small_recipe, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
READ_ONLY = 'mount --bind "{0}" "{0}" && mount -o remount,bind,ro "{0}"'
"""As the system does with a disk that makes errors; files that are open stay as they are."""


def recipe_of(tmp_path: Path, text_folder: Path, *, steps: int = 6, out: str = "run", **changes: Any) -> Path:
    """Four micro-batches a step."""
    sizes = {f"model.{key}": value for key, value in SIZES.items()}
    few = {"train.micro_batch_sequences": 4, "train.precision": "fp32", "data.validation": None}
    recipe = small_recipe(text_folder, tmp_path / out, tmp_path / "cache", steps=steps, **sizes, **few, **changes)
    return write_recipe(tmp_path / "recipe.yaml", recipe)


def require_mounts() -> None:
    try:
        done = subprocess.run([*own_mounts(), "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode:
        pytest.skip(f"no namespace of mounts here: {done.stderr.strip()}")


def test_output_on_a_full_disk_stops_nothing(tmp_path: Path, text_folder: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with faulty_run(tmp_path, recipe_of(tmp_path, text_folder), stdout=full) as run:
            assert run.end() == 0, run.output
            assert run.output.count("the output cannot be written") == 1
            assert "No space left on device" in run.output
            assert "Traceback" not in run.output
    finally:
        os.close(full)
    assert checkpoint.find_step(tmp_path / "run", None).step == 6
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("streams", ["stdout", "both"])
def test_a_reader_that_leaves_does_not_keep_an_interrupt_from_saving(
    tmp_path: Path, text_folder: Path, streams: str
) -> None:
    """Ctrl-C under `| tee log` and under `2>&1 | tee log` ends tee first; then lines of the second step are written."""
    fault = "on_sums(lambda n, training: at({6: 'second', 10: 'third'}[n]) if training and n in (6, 10) else None)"
    reader, writer = os.pipe()
    ends = {"stdout": writer, "stderr": writer if streams == "both" else None}
    with faulty_run(tmp_path, recipe_of(tmp_path, text_folder), fault, **ends) as run:
        os.close(writer)
        run.reached("second")
        os.close(reader)
        run.go("second")
        interrupt(run.reached("third"), signal.SIGINT)
        run.go("third")
        assert run.end() == 75, run.output
        assert ("stopped by a signal after step 2" in run.output) == (streams == "stdout")
        assert "Traceback" not in run.output
    assert checkpoint.find_step(tmp_path / "run", None).step == 2


FULL = """
import errno
ballast = FOLDER / "disk" / "ballast"
def act(n, training):
    if training and n == 4 * 4 + 1:      # the fifth step begins
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC
    if training and n == 4 * 21 + 1:     # pages that are there already hold a few lines more
        ballast.unlink()
on_sums(act)
"""
ON_DISK = """
mount -t tmpfs -o size=16m tmpfs "$1/disk" || exit
folder="$1"; shift; "$@"; code=$?
cp -a "$folder/disk/run" "$folder/kept"
exit $code
"""


def test_metrics_on_a_disk_that_is_full_for_a_while_are_whole_in_the_end(tmp_path: Path, text_folder: Path) -> None:
    require_mounts()
    (tmp_path / "disk").mkdir()
    recipe = recipe_of(tmp_path, text_folder, steps=24, out="disk/run")
    with faulty_run(tmp_path, recipe, FULL, through=own_mounts(ON_DISK, str(tmp_path))) as run:
        assert run.end() == 0, run.output
        assert run.output.count("metrics.jsonl cannot be written, training goes on") == 1, run.output
    assert [row["step"] for row in metrics(tmp_path / "kept")] == [*range(1, 25)]
    assert checkpoint.find_step(tmp_path / "kept", None).step == 24


def test_a_folder_that_is_read_only_from_the_start_is_named_and_left_alone(tmp_path: Path, text_folder: Path) -> None:
    require_mounts()
    (tmp_path / "disk").mkdir()
    recipe = recipe_of(tmp_path, text_folder, out="disk/run")
    through = own_mounts(READ_ONLY.format(tmp_path / "disk") + ' && exec "$@"')
    with faulty_run(tmp_path, recipe, through=through) as run:
        assert run.end() == 6, run.output
        assert "run cannot be written" in run.output and str(tmp_path / "disk") in run.output
        assert "Traceback" not in run.output
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_folder_that_becomes_read_only_ends_the_run_at_its_last_checkpoint(tmp_path: Path, text_folder: Path) -> None:
    require_mounts()
    fault = f"""
import subprocess
command = {READ_ONLY.format(tmp_path / "run")!r}
on_sums(lambda n, training: subprocess.run(command, shell=True, check=True) and None if training and n == 14 else None)
"""
    recipe = recipe_of(tmp_path, text_folder, **{"checkpoint.every_steps": 2})
    with faulty_run(tmp_path, recipe, fault, through=own_mounts()) as run:
        assert run.end() == 6, run.output
        assert "the checkpoint of step 4 could not be written" in run.output and "Read-only file system" in run.output
        assert "the checkpoint of step 2 is intact" in run.output
    assert [path.name for path in checkpoint.step_folders(tmp_path / "run")] == ["step-00000002"]
    assert checkpoint.validate(checkpoint.find_step(tmp_path / "run", 2).path) is None
    with faulty_run(tmp_path, recipe) as run:
        assert run.end() == 0, run.output
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
