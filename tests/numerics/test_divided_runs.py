"""What divided weights must not change: first weights, going back, compilation, float16, recomputed activations.

All in the processes of one launch; each is compared with the run of one process that does the same.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from faulty_runs import bad_text
from launched_runs import HANG_SECONDS, run_segments, weights_hash
from lmssl import checkpoint
from lmssl.recipe.load import load_recipe
from lmssl.train.launch import can_compile
from lmssl.train.run import train
from runs import metrics, small_recipe, tensors_of, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 7
BACKENDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
DIVIDED = ("fsdp2", "zero1", "zero2", "zero3")
BAD = {"checkpoint": (66, 80), "beginning": (3, 20)}
"""Positions of steps 5 and 6 with a checkpoint of step 4, and of the first two steps; steps have 16."""
FACTORS: dict[str, tuple[list[int], float]] = {
    "half-fsdp2": ([20], 1e7),
    "spike-ddp": (list(range(4 * 66, 4 * 67)), 10.0),
}
"""Positions whose losses are so often themselves: in step 2, on one rank, until float16 overflows; all of step 67, when
there are enough steps to compare with, which have 4.
"""
FURTHER: dict[str, dict[str, Any]] = {
    "half-ddp": {"train.precision": "fp16"},
    "half-fsdp2": {"train.precision": "fp16"},
    "recomputed-fsdp2": {"train.activation_checkpointing": "full"},
    "recomputed-zero3": {"train.activation_checkpointing": "full"},
    "spike-ddp": {
        "guard.spike": "skip",
        "train.tokens": 256 * 70,
        "train.batch_tokens": 256,
        "train.micro_batch_sequences": 1,
        "train.log_every_steps": 10,
        "checkpoint.every_steps": None,
    },
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def recipe_of(folder: Path, text: Path, name: str, **changes: Any) -> Path:
    recipe = small_recipe(
        text,
        folder / name,
        folder / "cache",
        steps=STEPS,
        **{
            **{f"model.{key}": value for key, value in SIZES.items()},
            "train.precision": "fp32",
            "train.micro_batch_sequences": 4,
            "train.hang_seconds": HANG_SECONDS,
            "train.max_skipped_steps": 1,
            "train.ema_decay": 0.9,
            "data.validation": None,
            "checkpoint.every_steps": 2,
            **changes,
        },
    )
    return write_recipe(folder / f"{name}.yaml", recipe)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """Where all runs lie; those of two processes are done."""
    folder = tmp_path_factory.mktemp("divided")
    plan: list[dict[str, Any]] = []
    for backend in BACKENDS:
        recipe = recipe_of(folder, text_folder, f"first-{backend}")
        plan.append({"backend": backend, "recipe": str(recipe), "hash": str(folder / f"hash-{backend}")})
    for backend in DIVIDED:
        for where, positions in BAD.items():
            recipe = recipe_of(folder, text_folder, f"{where}-{backend}")
            plan.append({"backend": backend, "recipe": str(recipe), "bad": positions})
    if can_compile():
        recipe = recipe_of(folder, text_folder, "compiled-fsdp2", **{"train.compile": "layers"})
        plan.append({"backend": "fsdp2", "recipe": str(recipe)})
    plan += further(folder, text_folder)
    (folder / "said").write_text(run_segments(folder / "plan.json", plan), encoding="utf-8")
    return folder


def further(folder: Path, text: Path) -> list[dict[str, Any]]:
    """Segments of whole runs that nothing disturbs."""
    found: list[dict[str, Any]] = []
    for name, changes in FURTHER.items():
        found.append({"backend": name.split("-")[1], "recipe": str(recipe_of(folder, text, name, **changes))})
        if name in FACTORS:
            found[-1] |= dict(zip(("bad", "factor"), FACTORS[name], strict=True))
    return found


def assert_near(ours: Path, theirs: Path, *, loss: float, weights: float) -> None:
    """Lines of metrics, and tensors at the end."""
    for a, b in zip(metrics(ours), metrics(theirs), strict=True):
        same = ("kind", "step", "num_targets", "skipped_steps", "overflow_steps", "loss_scale", "action", "positions")
        assert [b.get(name) for name in same] == [a.get(name) for name in same], theirs.name
        if a.get("loss") is not None:
            assert b["loss"] == pytest.approx(a["loss"], rel=loss), (theirs.name, a["step"])
    for group in ("model", "optim", "ema"):
        first, second = (tensors_of(checkpoint.find_step(run, None), group) for run in (ours, theirs))
        assert first.keys() == second.keys()
        largest = max(float((first[name] - second[name]).abs().max()) for name in first)
        print(f"{theirs.name}, {group}: {largest:.1e}")
        assert largest < weights, (theirs.name, group)


def test_the_first_weights_are_the_same_bits_everywhere(runs: Path, text_folder: Path) -> None:
    wanted = weights_hash(recipe_of(runs, text_folder, "first-single"))
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted(runs.glob("hash-*"))}
    assert len(found) == 2 * len(BACKENDS)
    assert set(found.values()) == {wanted}


@pytest.mark.parametrize("where", BAD)
def test_going_back_equals_one_process_that_goes_back(where: str, runs: Path, text_folder: Path) -> None:
    """The bad text is in the rows of one rank; where there is no checkpoint, the first weights are drawn again."""
    with bad_text(BAD[where]):
        single = train(load_recipe(recipe_of(runs, text_folder, f"{where}-single")))
    wanted = metrics(single)
    (back,) = [row for row in wanted if row["kind"] == "guard"]
    assert (back["from_step"], back["to_step"]) == ((6, 4) if where == "checkpoint" else (2, 0))
    for backend in DIVIDED:
        found = metrics(runs / f"{where}-{backend}")
        assert [(row["kind"], row["step"], row.get("skip")) for row in found] == [
            (row["kind"], row["step"], row.get("skip")) for row in wanted
        ]
        for a, b in zip(wanted, found, strict=True):
            if a["kind"] == "train":
                assert math.isfinite(b["loss"])
                assert b["loss"] == pytest.approx(a["loss"], rel=5e-6), (backend, a["step"])
        ours, theirs = (checkpoint.find_step(run, STEPS) for run in (single, runs / f"{where}-{backend}"))
        for group in ("model", "optim", "ema"):
            first, second = tensors_of(ours, group), tensors_of(theirs, group)
            assert first.keys() == second.keys()
            largest = max(float((first[name] - second[name]).abs().max()) for name in first)
            assert largest < 2e-5, (backend, group)
        state = json.loads(theirs.text("state.json"))
        assert state["skip"] == json.loads(ours.text("state.json"))["skip"]


@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
def test_layers_compiled_under_fsdp2_lose_what_plain_ones_do(runs: Path, text_folder: Path) -> None:
    """The hooks that gather a layer's weights stand around what is compiled."""
    plain = train(load_recipe(recipe_of(runs, text_folder, "plain-single")))
    losses = [[row["loss"] for row in metrics(run)] for run in (plain, runs / "compiled-fsdp2")]
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    (session,) = (runs / "compiled-fsdp2" / "sessions.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(session)["compile"] == "layers"


@pytest.mark.parametrize("name", ["half-ddp", "half-fsdp2"])
def test_float16_overflows_and_trains_as_in_one_process(name: str, runs: Path, text_folder: Path) -> None:
    """Where gradients of one rank overflow, all leave the step out and halve the scale."""
    with bad_text(*FACTORS.get(name, ((), 1.0))):
        single = train(load_recipe(recipe_of(runs, text_folder, f"{name}-single", **FURTHER[name])))
    overflows = [row["step"] for row in metrics(single) if row.get("action") == "overflow"]
    assert overflows == ([2] if name in FACTORS else [])
    assert_near(single, runs / name, loss=1e-3, weights=1e-3)


def test_recomputed_activations_change_nothing_where_weights_are_gathered(runs: Path, text_folder: Path) -> None:
    """A layer that is computed again gathers its weights again."""
    single = train(load_recipe(recipe_of(runs, text_folder, "kept-single")))
    for backend in ("fsdp2", "zero3"):
        assert_near(single, runs / f"recomputed-{backend}", loss=5e-6, weights=2e-5)


def test_a_spike_is_left_out_by_all_ranks(runs: Path, text_folder: Path) -> None:
    """A loss of ten times itself, which is a number."""
    positions, factor = FACTORS["spike-ddp"]
    with bad_text(positions, factor):
        single = train(load_recipe(recipe_of(runs, text_folder, "spike-single", **FURTHER["spike-ddp"])))
    (row,) = [row for row in metrics(single) if row["kind"] == "guard" and row["step"] == 67]
    assert (row["action"], row["reason"], row["positions"]) == ("skip", "spike", [positions[0], positions[-1]])
    assert_near(single, runs / "spike-ddp", loss=5e-6, weights=2e-5)


def test_zero_says_that_its_saves_gather_while_training_waits(runs: Path) -> None:
    said = (runs / "said").read_text(encoding="utf-8").splitlines()
    (first, *_) = [line for line in said if "recomputed-zero3 from" in line or "under ZeRO a save gathers" in line]
    assert first == "under ZeRO a save gathers every tensor while training waits; only writing it is in the background"
