"""The section `optim` by role."""

from __future__ import annotations

from typing import Any

from lmssl.recipe.optim import AdamW, Muon, RoleRates, optim_problems, role_rates


def test_adamw_updates_all_by_one_rate_unless_told_otherwise() -> None:
    plain = role_rates(AdamW(kind="adamw", lr=0.01))
    assert {rates.peak_lr for rates in plain.values()} == {0.01}
    assert {rates.optimizer for rates in plain.values()} == {"adamw"}
    assert plain["vector"].weight_decay == 0.0
    other = role_rates(AdamW(kind="adamw", lr=0.01, embedding_lr=0.02, head_lr=0.03))
    assert [other[role].peak_lr for role in ("matrix", "embedding", "head", "vector")] == [0.01, 0.02, 0.03, 0.01]


def test_muon_updates_matrices_and_adamw_the_rest() -> None:
    rates = role_rates(Muon(kind="muon", lr=0.02, weight_decay=0.2))
    assert rates["matrix"] == RoleRates("muon", 0.02, 0.2)
    assert rates["embedding"] == RoleRates("adamw", 0.02, 0.2)  # updates have one size, so one rate suits both
    assert rates["vector"] == RoleRates("adamw", 0.02, 0.0)
    assert role_rates(Muon(kind="muon", lr=0.02, adamw_lr=0.001))["head"].peak_lr == 0.001


def test_rates_that_say_nothing_are_refused() -> None:
    section: Any = AdamW(kind="adamw", lr=0.01, head_lr=0.03)
    assert len([*optim_problems(section, has_head=False)]) == 1
    assert [*optim_problems(section, has_head=True)] == []
