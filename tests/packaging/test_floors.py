"""The oldest versions that pyproject.toml accepts really work: installed, imported, trained with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

# Every other torch is a download of gigabytes. Its floor is exercised where a GPU machine has torch 2.11, by the tests
# as they stand; here it is the version of constraints.txt.
NOT_AT_FLOOR = {"torch"}
STEPS = 4


@pytest.fixture(scope="module")
def floors(root: Path) -> dict[str, str]:
    """Requirement -> lowest accepted version, of the package and its tests."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["test"])]
    pins = dict(
        line.split("==") for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
    )
    found = {}
    for requirement in wanted:
        (bound,) = requirement.specifier
        assert bound.operator == ">=", f"{requirement} has no floor"
        found[requirement.name] = pins[requirement.name] if requirement.name in NOT_AT_FLOOR else bound.version
    return found


@pytest.fixture(scope="module")
def python(floors: dict[str, str], root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the floors."""
    home = tmp_path_factory.mktemp("floors")
    pins = home / "floors.txt"
    pins.write_text("".join(f"{name}=={version}\n" for name, version in floors.items()), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "venv", home / "env"], check=True)
    python = home / "env" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", pins], check=True)
    subprocess.run([*pip, "-c", root / "constraints.txt", "hatchling", "editables"], check=True)
    subprocess.run([*pip, "--no-build-isolation", "--no-deps", "-e", root], check=True)
    return python


def _run(python: Path, *arguments: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    result = subprocess.run([python, *arguments], cwd=cwd, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def test_the_environment_holds_the_floors(python: Path, floors: dict[str, str], tmp_path: Path) -> None:
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {sorted(floors)!r}}}))"
    installed = json.loads(_run(python, "-c", code, cwd=tmp_path))
    for name, version in floors.items():
        assert Version(installed[name].partition("+")[0]) == Version(version), name
    _run(python, "-m", "pip", "check", cwd=tmp_path)


def test_a_run_at_the_floors(python: Path, root: Path, tmp_path: Path) -> None:
    options = [f"train.tokens={STEPS * 8192}", "train.batch_tokens=8192", "schedule.warmup_tokens=8192"]
    recipe = root / "recipes" / "debug" / "gpt-llama.yaml"
    _run(
        python,
        "-m",
        "lmssl",
        "train",
        recipe,
        f"out={tmp_path / 'run'}",
        f"data.cache={tmp_path / 'cache'}",
        *options,
        cwd=root,
    )
    _run(python, "-m", "lmssl", "export", tmp_path / "run", cwd=root)
    assert (tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").is_file()
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "run" / "export").iterdir()}


def test_unit_tests_at_the_floors(python: Path, root: Path) -> None:
    # Old versions warn about their own dependencies' newer ones; that is nothing this project can mend.
    quiet = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "-m", "not slow"]
    summary = _run(python, "-m", "pytest", *quiet, "tests/recipe", "tests/data", cwd=root).splitlines()[-1]
    found = re.match(r"(\d+) passed", summary)
    assert found and int(found[1]) > 100 and "failed" not in summary, summary
