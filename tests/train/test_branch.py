"""Decays that branch off a stable checkpoint of another run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faulty_runs import faulty_run
from lmssl import checkpoint
from lmssl.cli import main
from lmssl.errors import LmsslError
from lmssl.recipe.load import load_recipe
from lmssl.train.branch import branch_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, tensors_of, write_recipe

STEP = 1024
STABLE = {
    "schedule": {"kind": "wsd", "warmup_tokens": 2 * STEP, "decay_ratio": 0.25, "min_lr_ratio": 0.1},
    "checkpoint": {"every_steps": 1, "keep_last": 20},
    "optim": {"kind": "muon", "lr": 3e-3},
    "train.tokens": 8 * STEP,
}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """Eight steps: two of warmup, four at the peak, two of decay."""
    folder = tmp_path_factory.mktemp("branch")
    recipe = small_recipe(text_folder, folder / "trunk", folder / "cache", **STABLE)
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


def fingerprint(run: Path) -> dict[str, str]:
    files = (path for path in run.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(run: Path, key: str) -> dict[int, Any]:
    return {row["step"]: row[key] for row in metrics(run) if row["kind"] == "train"}


def test_a_branch_reads_on_and_decays(trunk: Path) -> None:
    before = fingerprint(trunk)
    assert main(["train", "--from-checkpoint", f"{trunk}@4", "--decay", "--decay-tokens", "4e3"]) == 0
    assert fingerprint(trunk) == before
    run = trunk.parent / "trunk-step-4-decay-4096"
    # The step after the checkpoint has the trunk's weights, optimiser and text, and a rate still at the peak.
    assert rows(run, "loss")[5] == rows(trunk, "loss")[5]
    assert rows(run, "next_position") == {step: 16 * step for step in (5, 6, 7, 8)}
    ratios = [rate / 3e-3 for rate in rows(run, "lr").values()]
    assert ratios == pytest.approx([0.1 + 0.9 * left for left in (1, 0.75, 0.5, 0.25)])
    recipe = load_recipe(run / "recipe.yaml").recipe
    assert recipe.branch is not None
    assert (recipe.branch.run, recipe.branch.step, recipe.name) == (str(trunk), 4, "small-step-4-decay-4096")


def test_the_same_command_continues_a_branch(trunk: Path) -> None:
    command = [
        "train",
        "--from-checkpoint",
        f"{trunk}@3",
        "--decay",
        "--decay-tokens",
        "3072",
        "checkpoint.keep_last=9",
    ]
    assert main(command) == 0
    run = trunk.parent / "trunk-step-3-decay-3072"
    losses, last = rows(run, "loss"), checkpoint.find_step(run, 6)
    weights = dict(tensors_of(last, "model"))
    for step in (5, 6):
        path = checkpoint.find_step(run, step).path
        path.rename(path.with_name(f"moved-{step}"))
    assert main(command) == 0
    assert rows(run, "loss") == losses
    assert all(
        tensor.equal(weights[name]) for name, tensor in tensors_of(checkpoint.find_step(run, 6), "model").items()
    )


def test_the_decay_of_the_trunk_is_that_of_a_branch(trunk: Path) -> None:
    loaded = branch_recipe(
        f"{trunk}@6", recipe=None, overrides=[f"out={trunk.parent / 'again'}"], decay_tokens=2 * STEP
    )
    run = train(loaded)
    assert rows(run, "loss") == {step: loss for step, loss in rows(trunk, "loss").items() if step > 6}


def test_length_and_form_of_the_decay(trunk: Path) -> None:
    recipe = branch_recipe(
        f"{trunk}@3", recipe=None, overrides=["schedule.decay=1-sqrt", "schedule.min_lr_ratio=0"]
    ).recipe
    assert recipe.train.tokens == 4 * STEP  # a quarter of the new run, as the trunk's decay is of the old one
    schedule: Any = recipe.schedule
    assert (schedule.decay, schedule.min_lr_ratio, schedule.decay_ratio) == ("1-sqrt", 0.0, 0.25)
    given = branch_recipe(
        str(trunk) + "@4",
        recipe=trunk / "recipe.yaml",
        overrides=["name=other", f"out={trunk.parent / 'other'}"],
        decay_tokens=1,
    ).recipe
    assert (given.name, given.out_path) == ("other", str(trunk.parent / "other"))
    assert given.train.tokens == 5 * STEP


@pytest.mark.parametrize(
    ("step", "overrides", "what", "remedy"),
    [
        ("@9", [], "no valid checkpoint of step 9", "steps there: 1, 2, 3"),
        ("@7", [], "already in its decay at step 7: its learning rate is at 0.55 of the peak", "RUN@STEP"),
        ("", [], "already in its decay at step 8", "RUN@STEP"),
        ("@1", [], "in its warmup at step 1", "RUN@STEP"),
        ("@4", ["optim.lr=1e-3"], r"made by another recipe:\n    optim.lr: 0.003 there, 0.001 now", "undo the other"),
        ("@4", ["schedule.kind=cosine"], "cosine schedule falls from its peak on", "wsd or constant"),
        (
            "@4",
            ["schedule.warmup_tokens=3072"],
            "the 4 steps before the branch had other learning rates",
            "earlier step",
        ),
    ],
)
def test_what_cannot_be_branched_off(trunk: Path, step: str, overrides: list[str], what: str, remedy: str) -> None:
    with pytest.raises(LmsslError, match=what) as caught:
        branch_recipe(f"{trunk}{step}", recipe=None, overrides=overrides, decay_tokens=STEP)
    assert remedy in str(caught.value.remedy)


def test_without_a_step_all_ranks_take_the_one_that_is_decided(trunk: Path) -> None:
    """Whatever is the newest when this rank looks."""
    asked: list[str] = []

    def decide(newest: Callable[[], str]) -> str:
        asked.append(newest())
        return "4"

    recipe = branch_recipe(str(trunk), recipe=None, decide=decide).recipe
    assert recipe.branch is not None
    assert (asked, recipe.branch.step) == (["8"], 4)
    assert branch_recipe(f"{trunk}@3", recipe=None, decide=decide).recipe.name.startswith("small-step-3")
    assert asked == ["8"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_begin_at_one_step_of_a_run_that_goes_on(trunk: Path, tmp_path: Path) -> None:
    """Rank 1 looks first and finds an older checkpoint; both take the one that rank 0 finds."""
    fault = f"""
sys.argv[1:] = ["train", "--from-checkpoint", {str(trunk)!r}, "--decay", "--decay-tokens", "2048"]
from lmssl import checkpoint
find = checkpoint.find_step
checkpoint.find_step = lambda run, step: find(run, (5, 4)[RANK] if step is None else step)
"""
    with faulty_run(tmp_path, trunk.parent / "recipe.yaml", fault, launcher="torchrun") as found:
        assert found.end() == 0, found.output
    run = trunk.parent / "trunk-step-5-decay-2048"
    recipe = load_recipe(run / "recipe.yaml").recipe
    assert recipe.branch is not None and recipe.branch.step == 5
    assert list(rows(run, "loss")) == [6, 7]
    assert not (trunk.parent / "trunk-step-4-decay-2048").exists()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(LmsslError, match="is no run folder"):
        branch_recipe(str(tmp_path), recipe=None)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--decay", "recipes/debug/gpt-llama.yaml"], "--from-checkpoint and --decay belong together"),
        (["--from-checkpoint", "runs/x"], "--from-checkpoint and --decay belong together"),
        ([], "there is no recipe"),
    ],
)
def test_options_that_say_half(arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments]) == 2
    assert what in capsys.readouterr().err
