"""What is kept, and what is removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmssl import checkpoint
from lmssl.checkpoint import Checkpoint, Keep
from lmssl.checkpoint.keep import Known, kept_steps, prune
from lmssl.errors import CheckpointError

Save = Callable[..., Checkpoint]


def steps_of(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.step_folders(run)]


def removed(run: Path, keep: Keep, verified_step: int) -> list[int]:
    said: list[str] = []
    found = prune(run, keep, verified_step=verified_step, report=said.append)
    assert said == []
    return found


known = st.builds(
    Known,
    step=st.integers(1, 60),
    finite=st.booleans(),
    loss=st.none() | st.floats(0.0, 9.0),
)
keeps = st.builds(
    Keep,
    last=st.integers(1, 4),
    every_steps=st.none() | st.integers(1, 20),
    best=st.none() | st.integers(1, 3),
)


@given(st.lists(known, unique_by=lambda k: k.step), keeps)
def test_policies_add_up(found: list[Known], keep: Keep) -> None:
    stay = kept_steps(found, keep)
    steps = sorted(k.step for k in found)
    assert stay <= set(steps)
    assert set(steps[-keep.last :]) <= stay
    if keep.every_steps is not None:
        assert {step for step in steps if step % keep.every_steps == 0} <= stay
    finite = [k.step for k in found if k.finite]
    assert not finite or max(finite) in stay
    measured = sorted((k for k in found if k.loss is not None), key=lambda k: k.loss or 0.0)
    if keep.best is not None and measured:
        worst = [k.loss for k in measured][: keep.best][-1]
        assert sum(k.step in stay and (k.loss or 0.0) <= (worst or 0.0) for k in measured) >= min(
            keep.best, len(measured)
        )
    assert len(stay) <= keep.most(60) + 1


def test_the_last_ones_stay(tmp_path: Path, save: Save) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert removed(tmp_path, Keep(last=2), 4) == [1, 2]
    assert steps_of(tmp_path) == [3, 4]


def test_a_save_prunes_by_every_policy(tmp_path: Path, save: Save) -> None:
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: None, 5: 3.5, 6: 3.6, 7: 3.7}
    for step, loss in losses.items():
        save(tmp_path, step, keep=Keep(last=1, every_steps=3, best=2), validation_loss=loss)
    assert steps_of(tmp_path) == [2, 3, 5, 6, 7]


def test_the_last_finite_one_stays_however_many_are_saved_after_it(tmp_path: Path, save: Save) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=Keep(last=2), finite=step <= 2)
    assert steps_of(tmp_path) == [2, 5, 6]


def test_a_damaged_checkpoint_counts_for_no_policy_and_stays_for_verify(tmp_path: Path, save: Save) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "checkpoints/step-00000003/state.json").unlink()
    assert removed(tmp_path, Keep(last=2), 4) == [1]
    assert steps_of(tmp_path) == [2, 3, 4]


def test_a_damaged_later_one_never_costs_the_one_just_saved(tmp_path: Path, save: Save) -> None:
    """After a fallback from step 9, training saves step 4 on the way there."""
    for step in (3, 9):
        save(tmp_path, step)
    content = bytearray((tmp_path / "checkpoints/step-00000009/model.safetensors").read_bytes())
    content[-1] ^= 1  # the manifest and every size are right, so only reading all of it tells
    (tmp_path / "checkpoints/step-00000009/model.safetensors").write_bytes(content)
    save(tmp_path, 4, keep=Keep(last=1))
    assert steps_of(tmp_path) == [4, 9]
    found = checkpoint.find_latest(tmp_path, lambda _: None)
    assert found is not None and found.step == 4


def test_what_cannot_be_removed_is_told_and_stops_nothing(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("lmssl.checkpoint.keep.remove", refused)
    said: list[str] = []
    assert prune(tmp_path, Keep(last=1), verified_step=3, report=said.append) == []
    assert len(said) == 2 and "step-00000001 cannot be removed, training goes on" in said[0]


def test_the_checkpoint_that_fails_prunes_nothing(tmp_path: Path, save: Save) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    with pytest.raises(CheckpointError):
        save(tmp_path, 3, keep=Keep(last=1), texts={"no/such/folder.json": ""})
    assert steps_of(tmp_path) == [1, 2]
