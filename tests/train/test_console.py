"""The line that tells people how training goes."""

from __future__ import annotations

import pytest

from lmssl.train.console import RunConsole


def test_all_losses_of_an_objective_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole(enabled=True, total_tokens=1000, first_tokens=0)
    row = {
        "step": 3,
        "tokens": 100,
        "loss": 7.5,
        "loss_replaced": 0.25,
        "loss_masked": None,
        "loss_scale": 65536.0,
        "lr": 1e-3,
    }
    console.advance(row | {"time": {"tokens_per_second": 1234.0, "data_wait_ratio": 0.0}}, 60.0)
    said = capsys.readouterr().out
    assert "loss 7.5000  replaced 0.2500  lr 1.0e-03" in said and "masked" not in said and "scale" not in said
