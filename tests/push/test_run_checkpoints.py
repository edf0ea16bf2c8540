"""The checkpoints of a run as revisions, pushed while it trains and again when it is done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from hub_stand_in import Fault, HubStandIn
from lmssl import checkpoint
from lmssl.errors import PushError
from lmssl.push.run import Push, push, revision_names
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import small_recipe, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

REPO = "lab/small"
MEANWHILE = """
import shutil, sys
from pathlib import Path
from lmssl.push.run import Push, push
run, aside = Path(sys.argv[1]), Path(sys.argv[2])
def report(text):
    print(text)
    if text.startswith("signed in"):
        aside.rename(run / "checkpoints" / aside.name)
        shutil.rmtree(run / "checkpoints" / "step-00000002")
print(push(Push(run, "lab/small", revisions="step{step}"), sleep=lambda _: None, report=report))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("push")
    recipe = small_recipe(text_folder, folder / "run", folder / "cache", steps=4)
    recipe["checkpoint"] = {"every_steps": 2, "keep_last": 3}
    return train(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


def environment(hub: HubStandIn, folder: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return inherited | hub.environment(str(folder / "home"))


def lmssl(hub: HubStandIn, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lmssl", "push", *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment(hub, folder),
    )


def test_a_run_with_its_checkpoints(run: Path, tmp_path: Path) -> None:
    words = (str(run), "--repo", REPO, "--revisions", "step{step}-tokens{tokens_m}M")
    with HubStandIn().running() as hub:
        hub.faults.append(Fault("POST .*/commit/step4", 503, after=True))
        done = lmssl(hub, tmp_path, *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].endswith(": step2-tokens0M, step4-tokens0M, main uploaded")
        for name, step in (("step2-tokens0M", 2), ("step4-tokens0M", 4), ("main", 4)):
            found = load(hub.files(REPO, name)["model.safetensors"])
            wanted = checkpoint.find_step(run, step).tensors("model")
            assert found.keys() == set(wanted)
            assert all(torch.equal(found[key], wanted[key]) for key in found)
            assert f"in {step} steps" in hub.files(REPO, name)["README.md"].decode()
        before = {name: len(hub.commits(REPO, name)) for name in hub.repositories[REPO].branches}
        again = lmssl(hub, tmp_path, *words)
        assert again.returncode == 0, again.stderr
        assert again.stdout.splitlines()[-1].endswith("nothing was uploaded")
        assert {name: len(hub.commits(REPO, name)) for name in hub.repositories[REPO].branches} == before


def test_a_run_that_saves_and_prunes_meanwhile(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    aside = (copy / "checkpoints" / "step-00000004").rename(tmp_path / "step-00000004")
    with HubStandIn().running() as hub:
        command = [sys.executable, "-c", MEANWHILE, copy, aside]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(hub, tmp_path))
        assert done.returncode == 0, done.stderr
        assert "the checkpoint of step 2 was removed by its run meanwhile" in done.stdout
        assert done.stdout.splitlines()[-1] == "['main']"
        assert "in 4 steps" in hub.files(REPO)["README.md"].decode()
        assert hub.repositories[REPO].branches.keys() == {"main"}


def test_a_damaged_checkpoint_keeps_no_other_back(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    weights = copy / "checkpoints" / "step-00000002" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with HubStandIn().running() as hub:
        done = lmssl(hub, tmp_path, str(copy), "--repo", REPO, "--revisions", "step{step}")
        assert done.returncode == 6, done.stderr
        assert "step2 is passed over" in done.stdout
        assert done.stdout.splitlines()[-1].endswith(": step4, main uploaded")
        assert hub.repositories[REPO].branches.keys() == {"main", "step4"}


def test_a_missing_licence_is_said_before_anything_is_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*_: object, **__: object) -> None:
        raise AssertionError("exported")

    monkeypatch.setattr("lmssl.export.export_run", export)
    for words in ({"public": True}, {"public": True, "step": 2, "dry_run": True}):
        with pytest.raises(PushError, match="names no licence"):
            push(Push(run, REPO, **words), sleep=lambda _: None)
    with pytest.raises(PushError, match="in the Hub's words"):
        push(Push(run, REPO, licence="Apache 2.0"), sleep=lambda _: None)
    with pytest.raises(AssertionError, match="exported"):
        push(Push(run, REPO, public=True, licence="mit", dry_run=True), sleep=lambda _: None)


def test_names_of_revisions(run: Path) -> None:
    assert revision_names(Push(run, REPO, revisions="step{step:06d}")) == {2: "step000002", 4: "step000004"}
    assert list(revision_names(Push(run, REPO, revisions="s{step}-{tokens}")).values()) == ["s2-2048", "s4-4096"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("step", "several checkpoints the same name"),
        ("{tokens_b}B", "several checkpoints the same name"),
        ("{words}", "{words} is not known"),
        ("{step.__class__}", "not known"),
        ("{step", "is no template"),
        ("../{step}", "cannot be the name"),
        ("a {step}", "cannot be the name"),
    ],
)
def test_templates_that_give_no_names(run: Path, template: str, says: str) -> None:
    with pytest.raises(PushError, match=says.replace("{", r"\{")):
        revision_names(Push(run, REPO, revisions=template))


def test_a_folder_has_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(PushError, match="this is none"):
        push(Push(tmp_path, REPO, revisions="step{step}"), sleep=lambda _: None)
