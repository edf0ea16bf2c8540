"""Tests mirror the source, the changelog knows the version, and no file knows the machine it was written on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import lmssl

ACROSS = {"numerics", "golden", "recipes", "faults", "house", "packaging"}
MACHINE = re.compile(r"(?<![\w.~-])/(?:home|root|work|opt|mnt)/")


def test_tests_mirror_the_source(root: Path) -> None:
    assert [path for path in _tests(root) if not _has_source(path, root)] == []


def test_no_init_files_among_the_tests(root: Path) -> None:
    assert list((root / "tests").rglob("__init__.py")) == []


def _tests(root: Path) -> list[Path]:
    found = sorted((root / "tests").rglob("test_*.py"))
    return [path for path in found if path.relative_to(root / "tests").parts[0] not in ACROSS]


def _has_source(path: Path, root: Path) -> bool:
    """Whether `data/test_pack.py` has its `data/pack.py`; `data/test_pack_speed.py` may split it by aspect."""
    folder = root / "lmssl" / path.relative_to(root / "tests").parent
    words = path.stem.removeprefix("test_").split("_")
    return any((folder / ("_".join(words[:count]) + ".py")).exists() for count in range(1, len(words) + 1))


def test_a_test_without_source_is_seen(root: Path) -> None:
    assert _has_source(root / "tests" / "test_errors.py", root)
    assert not _has_source(root / "tests" / "data" / "test_errors.py", root)


def test_changelog_knows_the_version(root: Path) -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", (root / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert next(version for version in versions if version != "Unreleased") == lmssl.__version__


def test_constraints_pin_every_requirement(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["fast"], *extras["test"], *extras["dev"]]
    names = {re.split(r"[\[<>=!~ ]", line)[0].lower().replace("_", "-") for line in wanted} - {"lmssl"}
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(equals and version for _, equals, version in pins), "a line of constraints.txt is no exact version"
    assert names <= {name.replace("_", "-") for name, _, _ in pins}


def test_no_machine_paths(tracked: list[Path], root: Path) -> None:
    wrong = []
    for path in tracked:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE.search(line):
                wrong.append(f"{path.relative_to(root)}:{number}: {line.strip()[:120]}")
    assert wrong == []


def test_a_machine_path_is_seen() -> None:
    # Put together here, so that this file passes its own test.
    assert MACHINE.search("open('/{}/ann/corpus.txt')".format("home"))
    assert not MACHINE.search("https://example.org/{}/".format("home"))
    assert not MACHINE.search("runs/net/{0}/x ~/{0}/x".format("work"))
