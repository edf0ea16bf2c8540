"""Seconds by phase, and numbers per line, by a clock that the test moves."""

from __future__ import annotations

import pytest
import torch

from lmssl.model.flops import trained_flops_per_token
from lmssl.recipe.batches import BatchPlan
from lmssl.recipe.sections import Recipe
from lmssl.train.peaks import peak_flops
from lmssl.train.phases import COMPUTE, COUNTS, DATA, EVALUATE, EXCHANGE, LOOP, SAVE, UPDATE, Phases
from lmssl.train.telemetry import Telemetry, flops_per_token
from runs import small_recipe


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def spend(phases: Phases, clock: Clock, *parts: tuple[str, float]) -> None:
    for name, seconds in parts:
        phases.enter(name)
        clock.now += seconds
    phases.enter(LOOP)


def test_every_second_belongs_to_one_phase() -> None:
    clock = Clock()
    phases = Phases(clock=clock)
    spend(phases, clock, (DATA, 1.0), (COMPUTE, 4.0), (COMPUTE, 3.0), (UPDATE, 2.0))
    clock.now += 0.5
    with phases.inside(SAVE):
        clock.now += 10.0
    assert phases.name == LOOP
    found = phases.read()
    assert {name: found[name] for name in (DATA, COMPUTE, UPDATE, LOOP, SAVE)} == {
        DATA: 1.0,
        COMPUTE: 7.0,
        UPDATE: 2.0,
        LOOP: 0.5,
        SAVE: 10.0,
    }
    assert sum(phases.read().values()) == 0.0


def test_a_phase_in_words_says_step_and_micro_batch() -> None:
    clock = Clock()
    phases = Phases(clock=clock)
    phases.step = 11
    phases.enter(COMPUTE, "forward of micro-batch 3")
    clock.now += 2.0
    assert (str(phases), phases.seconds, phases.count) == ("forward of micro-batch 3 in step 12", 2.0, 1)
    phases.read()
    assert phases.count == 1  # reading is no progress


@pytest.fixture
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("recipe")
    return Recipe.model_validate(small_recipe(folder, folder / "run", folder / "cache"))


def test_a_line_leaves_evaluation_and_saves_out_and_says_where_the_time_went(recipe: Recipe) -> None:
    clock = Clock()
    phases = Phases(clock=clock)
    telemetry = Telemetry(recipe, phases, torch.device("cpu"), num_ranks=1, vocab_size=4096, step=0, clock=clock)
    plan = BatchPlan.even(16, sequence_length=64, num_steps=10)
    spend(
        phases,
        clock,
        *((DATA, 1.0), (COUNTS, 0.25), (COMPUTE, 5.0), (EXCHANGE, 0.25), (UPDATE, 1.5), (EVALUATE, 30.0), (SAVE, 2.0)),
    )
    clock.now += 2.0
    row = telemetry.read(4, plan)
    assert row["seconds"] == 10.0
    assert row["tokens_per_second"] == 4 * 1024 / 10
    assert row["data_wait_ratio"] == 0.1
    assert row["phase_seconds"] == {
        "data": 1.0,
        "counts": 0.25,
        "forward_and_backward": 5.0,
        "exchange": 0.25,
        "update": 1.5,
        "overhead": 2.0,
    }
    assert row["save_pause_seconds"] == 2.0
    assert row["mfu"] is None  # nobody knows the peak of a CPU
    assert row["memory_bytes"] > 10_000_000
    clock.now += 1.0
    assert telemetry.read(5, plan)["tokens_per_second"] == 1024


def test_utilisation_is_model_flops_over_the_peak_of_all_devices(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmssl.train.telemetry.peak_flops", lambda name, precision: 1e9 if name == "cpu" else None)
    clock = Clock()
    telemetry = Telemetry(
        recipe, Phases(clock=clock), torch.device("cpu"), num_ranks=2, vocab_size=4096, step=0, clock=clock
    )
    clock.now += 2.0
    per_token = trained_flops_per_token(
        recipe.model, recipe.objective, vocab_size=4096, sequence_length=64, target_ratio=1.0
    )
    assert flops_per_token(recipe, 4096) == {64: per_token}
    row = telemetry.read(3, BatchPlan.even(16, sequence_length=64, num_steps=10))
    assert row["mfu"] == pytest.approx(per_token * 3 * 1024 / 2.0 / 2e9)


def test_a_save_that_writes_files_moves_and_other_phases_do_not() -> None:
    now = [0.0]
    phases = Phases(clock=lambda: now[0])
    for name, seconds in ((COMPUTE, 9.0), (SAVE, 2.0)):
        phases.enter(name)
        count = phases.count
        now[0] += 7.0
        phases.saved_file()
        now[0] += 2.0
        assert (phases.seconds, phases.count) == (seconds, count)
    phases.enter(LOOP)
    assert phases.read()[SAVE] == 9.0  # files take nothing from the phase's own time


def test_a_device_that_is_not_known_has_no_peak() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16") is None
    assert peak_flops("cpu", "bf16") is None


@pytest.mark.gpu
def test_what_a_device_is_given_is_timed_there() -> None:
    """The host goes on at once; the time is the device's."""
    device = torch.device("cuda")
    phases = Phases(device)
    big = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    phases.enter(COMPUTE)
    for _ in range(20):
        big = big @ big * 1e-4
    phases.enter(UPDATE)
    phases.enter(LOOP)
    torch.cuda.synchronize()
    found = phases.read()
    assert found[COMPUTE] > 20 * 2 * 8192**3 / 2e15
    assert found[UPDATE] < 0.1 * found[COMPUTE]
    assert COMPUTE not in phases.read()
