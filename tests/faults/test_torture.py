"""A short torture run; `make torture` makes the long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from torture import torture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(("processes", "kills"), [(1, 6), (2, 2)])
def test_a_run_killed_at_random_moments_equals_one_left_in_peace(tmp_path: Path, processes: int, kills: int) -> None:
    counts = torture(tmp_path, kills=kills, seed=3, processes=processes)
    assert sum(counts.values()) == kills
