"""Products in 8 bits by torchao as PyPI has it: a whole run whose arithmetic torchao emulates on the CPU.

torchao is installed into a folder that only these runs see, because transformers imports it wherever it is. On a card
the products themselves are tested by tests/train/test_precision.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmssl import checkpoint
from runs import metrics, small_recipe, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TORCHAO = "torchao==0.18.0"
EMULATED = """
import dataclasses, sys
from torchao.float8 import Float8LinearConfig
plain = Float8LinearConfig.from_recipe_name
Float8LinearConfig.from_recipe_name = staticmethod(lambda name: dataclasses.replace(plain(name), emulate=True))
from lmssl.train import opening
opening.check_precision = lambda *_: None  # which asks for a card
from lmssl.cli import main
sys.exit(main(sys.argv[1:]))
"""
STEPS = 12


@pytest.fixture(scope="module")
def torchao(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchao")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", folder, TORCHAO], check=True)
    return folder


def run(folder: Path, text: Path, torchao: Path, precision: str, steps: int) -> tuple[Path, str]:
    """A run, or what it does further; returns its folder and what it said."""
    changes = {"train.precision": precision, "optim.lr": 1e-3}
    recipe = small_recipe(text, folder / precision, folder / "cache", steps=steps, **changes)
    recipe["schedule"] = {"kind": "constant", "warmup_tokens": 1024}
    path = write_recipe(folder / f"{precision}.yaml", recipe)
    env = {**os.environ, "PYTHONPATH": str(torchao)}
    command = [sys.executable, "-c", EMULATED, "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return folder / precision, done.stdout


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in metrics(out) if row["kind"] == "train"]


def test_a_run_in_8_bits_learns_as_one_in_bfloat16(tmp_path: Path, text_folder: Path, torchao: Path) -> None:
    plain, _ = run(tmp_path, text_folder, torchao, "bf16", STEPS)
    out, said = run(tmp_path, text_folder, torchao, "fp8", STEPS // 2)
    assert "14 linear layers multiply in 8 bits" in said
    out, said = run(tmp_path, text_folder, torchao, "fp8", STEPS)
    assert f"continuing {out} from step {STEPS // 2}" in said
    found, expected = losses(out), losses(plain)
    assert len(found) == len(expected) == STEPS
    assert found == pytest.approx(expected, rel=0.02)
    assert found != pytest.approx(expected, rel=1e-6)  # other arithmetic it is
    assert found[-1] < found[0] - 0.4
    by_kind = [checkpoint.find_step(path, STEPS).tensors("model") for path in (out, plain)]
    assert set(by_kind[0]) == set(by_kind[1])
    assert all(values.dtype.is_floating_point and values.element_size() == 4 for values in by_kind[0].values())
