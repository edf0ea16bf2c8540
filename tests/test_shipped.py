from __future__ import annotations

from pathlib import Path

import pytest

from lmssl import shipped


def test_a_path_that_exists_is_taken_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = Path("recipes/debug/gpt-llama.yaml")
    mine.parent.mkdir(parents=True)
    mine.write_text("name: mine\n")
    assert shipped.find("recipes/debug/gpt-llama.yaml") == mine


def test_shipped_files_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.find("recipes/debug/gpt-llama.yaml").read_text().startswith("#")
    assert (shipped.find("tokenizer/bpe-4k") / "tokenizer.json").is_file()


def test_other_paths_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("mine.yaml", "recipes/none.yaml", "corpora/x", "recipes/../pyproject.toml", str(tmp_path / "no"), "."):
        assert shipped.find(path) == Path(path)


def test_an_installed_wheel_keeps_its_copies_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "lmssl"
    (package / "_shipped" / "recipes").mkdir(parents=True)
    (package / "_shipped" / "recipes" / "x.yaml").write_text("name: x\n")
    monkeypatch.setattr(shipped, "__file__", str(package / "shipped.py"))
    monkeypatch.chdir(tmp_path)
    assert shipped.shipped_root() == package / "_shipped"
    assert shipped.find("recipes/x.yaml") == package / "_shipped" / "recipes" / "x.yaml"


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shipped.find("~/x.yaml") == tmp_path / "x.yaml"
