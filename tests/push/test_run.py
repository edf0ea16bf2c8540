"""Pushing, in processes of their own, to a stand-in for the Hub that fails on order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hub_stand_in import TOKEN, Fault, HubStandIn

REPO = "lab/tiny"
DRIVER = """
import json, sys, time
from pathlib import Path
time.sleep = lambda seconds: None  # of huggingface_hub, which tries some requests again by itself
from lmssl.errors import LmsslError
from lmssl.push.run import Push, push
given, waited, found = json.loads(sys.argv[1]), [], {}
private = given.pop("private", ())
try:
    push_it = Push(Path(given.pop("source")), **given)
    found["changed"] = push(push_it, sleep=waited.append, report=print, private=private)
except LmsslError as error:
    found["error"], found["code"] = str(error), error.exit_code
assert "torch" not in sys.modules, "a folder is pushed without it"
print(json.dumps(found | {"waited": waited}))
"""
Pusher = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A model folder that is no export of ours."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn(lfs=True).running() as stand_in:
        yield stand_in


@pytest.fixture
def pushed(hub: HubStandIn, model: Path, tmp_path: Path) -> Pusher:
    """Pushes in a fresh process and says what came of it, waits included, which are not waited."""

    def run(source: Path = model, *, repo: str = REPO, **given: Any) -> dict[str, Any]:
        command = [sys.executable, "-c", DRIVER, json.dumps({"source": str(source), "repo": repo, **given})]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(hub, tmp_path))
        assert done.returncode == 0, done.stderr
        *said, last = done.stdout.splitlines()
        return {"said": said, **json.loads(last)}

    return run


def environment(hub: HubStandIn, folder: Path) -> dict[str, str]:
    """Of a client, which the variable that keeps other tests off the network would stop."""
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return inherited | hub.environment(str(folder / "home"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_model_arrives_whole_private_and_once(hub: HubStandIn, pushed: Pusher, model: Path) -> None:
    before = contents(model)
    first = pushed()
    assert first.get("changed") == ["main"], first
    assert first["said"][0] == "signed in as tester"
    lines = [line for line, _ in hub.requests]
    assert lines[0] == "GET /api/whoami-v2"
    made = next(json.loads(data) for line, data in hub.requests if line == "POST /api/repos/create")
    assert made["visibility"] == "private"
    assert hub.repositories[REPO].private
    assert hub.files(REPO).keys() == before.keys() | {"lmssl.json", ".gitattributes"}
    assert {name: hub.files(REPO)[name] for name in before} == before
    assert pushed()["changed"] == []
    assert len(hub.commits(REPO)) == 2
    assert contents(model) == before
    assert not any(TOKEN.encode() in data for _, data in hub.requests)


def test_it_is_downloaded_equal(hub: HubStandIn, pushed: Pusher, model: Path, tmp_path: Path) -> None:
    pushed()
    code = (
        "import sys, huggingface_hub, transformers\n"
        f"folder = huggingface_hub.snapshot_download({REPO!r})\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({REPO!r})\n"
        "model.save_pretrained(sys.argv[1]); print(folder)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    wanted = load_file(model / "model.safetensors")
    for folder in (Path(done.stdout.split()[-1]), tmp_path / "again"):
        found = load_file(folder / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("fault", "waited"),
    [
        (Fault("POST .*/commit/", 503, times=2), [2, 4]),
        (Fault("POST .*/commit/", 500), [2]),
        (Fault("POST .*/commit/", 429, headers={"Retry-After": "77"}), [77]),
        (Fault("POST .*/commit/", 409), [2]),
        (Fault("POST .*/commit/", 412), [2]),
        (Fault("POST .*/commit/"), [2]),
        (Fault("POST .*/commit/", after=True), [2]),
        (Fault("POST .*/commit/", 504, after=True), [2]),
        (Fault("POST /api/repos/create", 500, times=2), [2, 4]),
        (Fault("POST /api/repos/create", after=True), [2]),
        (Fault("POST /api/validate-yaml", 503), [2]),
        (Fault("GET /api/whoami-v2", 502), [2]),
        (Fault("PUT /lfs/", 503, times=6), [2]),  # huggingface_hub's own attempts and one more
        (Fault("PUT /lfs/", times=6), [2]),
    ],
    ids=lambda value: f"{value.pattern}-{value.status}-{value.after}" if isinstance(value, Fault) else "",
)
def test_what_passes_is_waited_for(hub: HubStandIn, pushed: Pusher, fault: Fault, waited: list[int]) -> None:
    hub.faults.append(fault)
    found = pushed()
    assert (found["waited"], found["changed"]) == (waited, ["main"]), found
    assert "again in" in " ".join(found["said"])
    assert hub.commits(REPO) == ["initial commit", "Upload model"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("GET /api/whoami-v2", 401), ["401", "hf auth login"]),
        (Fault("POST .*/commit/", 401), ["401", "hf auth login"]),
        (Fault("POST /api/repos/create", 403), ["403", "may not write there"]),
        (Fault("POST .*/commit/", 403), ["403", "may not write there"]),
        (Fault("GET /api/models/lab/tiny", 404), ["404", "no such repository"]),
        (Fault("POST .*/commit/", 413), ["413", "--max-shard-size"]),
        (Fault("POST .*/commit/", 400), ["400", "see what the Hub says"]),
        (Fault("PUT /lfs/", 403), ["403", "may not write there", "uploading 'model.safetensors'"]),
        (Fault("PUT /lfs/", 413), ["413", "--max-shard-size", "uploading 'model.safetensors'"]),
    ],
    ids=lambda value: f"{value.pattern}-{value.status}" if isinstance(value, Fault) else "",
)
def test_what_is_refused_is_said_at_once(
    hub: HubStandIn, pushed: Pusher, model: Path, fault: Fault, says: list[str]
) -> None:
    before = contents(model)
    hub.faults.append(fault)
    found = pushed()
    assert (found["code"], found["waited"]) == (9, [])
    assert all(text in found["error"] for text in says), found["error"]
    assert contents(model) == before
    assert pushed()["changed"] == ["main"]


def test_weights_that_arrived_are_not_sent_again(hub: HubStandIn, pushed: Pusher) -> None:
    hub.faults.append(Fault("POST .*/commit/", 400))
    assert pushed()["code"] == 9
    assert pushed()["changed"] == ["main"]
    assert sum(line.startswith("PUT /lfs/") for line, _ in hub.requests) == 1


def test_patience_ends_after_minutes(hub: HubStandIn, pushed: Pusher) -> None:
    hub.faults.append(Fault("GET /api/whoami-v2", times=10**6))
    found = pushed()
    assert found["code"] == 9
    assert "gave up after 15 minutes" in found["error"]
    assert found["waited"][:4] == [2, 4, 8, 16]
    assert 600 < sum(found["waited"]) <= 900
    assert max(found["waited"]) == 120


def test_another_model_is_never_replaced(hub: HubStandIn, pushed: Pusher, model: Path, tmp_path: Path) -> None:
    pushed()
    held = dict(hub.files(REPO))
    other = tmp_path / "other"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(other)
    found = pushed(other)
    assert found["code"] == 9
    assert "another model" in found["error"]
    del hub.repositories[REPO].branches["main"][-1].files["lmssl.json"]  # one that was not pushed with lmssl
    held.pop("lmssl.json")
    assert "another model" in pushed()["error"]
    assert hub.files(REPO) == held


def test_a_changed_model_replaces_its_files_and_leaves_those_of_others(
    hub: HubStandIn, pushed: Pusher, model: Path, tmp_path: Path
) -> None:
    pushed()
    hub.repositories[REPO].branches["main"][-1].files["notes.txt"] = b"by hand"
    changed = tmp_path / "changed"
    LlamaForCausalLM.from_pretrained(model).save_pretrained(changed, max_shard_size="8KB")
    (changed / "README.md").write_text("---\nlicense: mit\n---\n# Tiny, again\n")
    assert pushed(changed)["changed"] == ["main"]
    names = hub.files(REPO).keys()
    assert "model.safetensors" not in names
    assert sum(name.startswith("model-0000") for name in names) > 1
    assert {"model.safetensors.index.json", "notes.txt"} <= names


def test_visibility_is_never_changed_silently(hub: HubStandIn, pushed: Pusher) -> None:
    pushed(public=True)
    assert not hub.repositories[REPO].private
    found = pushed()
    assert found["code"] == 9
    assert "the repository is public" in found["error"]
    assert len(hub.commits(REPO)) == 2


def test_everybody_needs_a_licence_before_anything_is_made(
    hub: HubStandIn, pushed: Pusher, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "copy").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "copy" / name).write_bytes((model / name).read_bytes())
    found = pushed(tmp_path / "copy", public=True)
    assert "names no licence" in found["error"]
    assert hub.repositories == {}


def test_a_token_that_only_reads(hub: HubStandIn, pushed: Pusher) -> None:
    hub.role = "read"
    found = pushed()
    assert (found["code"], found["waited"]) == (9, [])
    assert "reads and does not write" in found["error"]
    assert hub.repositories == {}


def test_a_foreign_organisation(hub: HubStandIn, pushed: Pusher) -> None:
    found = pushed(repo="elsewhere/tiny")
    assert "may not write there" in found["error"]
    assert "under the namespace elsewhere" in found["error"]


def test_a_card_that_the_hub_refuses(hub: HubStandIn, pushed: Pusher) -> None:
    found = pushed(licence="nonsense")
    assert "refuses the card" in found["error"]
    assert len(hub.commits(REPO)) == 1


def command(hub: HubStandIn | None, folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`lmssl push` as a person calls it."""
    variables = dict(os.environ) if hub is None else environment(hub, folder)
    return subprocess.run(
        [sys.executable, "-m", "lmssl", "push", *words],
        capture_output=True,
        text=True,
        check=False,
        env=variables | env,
    )


def test_the_command(hub: HubStandIn, model: Path, tmp_path: Path) -> None:
    done = command(hub, tmp_path, str(model), "--repo", REPO)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"{hub.endpoint}/{REPO}: main uploaded"
    again = command(hub, tmp_path, str(model), "--repo", REPO)
    assert again.stdout.splitlines()[-1].endswith("is up to date; nothing was uploaded")


def test_without_a_token_offline_or_with_one_on_the_command_line(hub: HubStandIn, model: Path, tmp_path: Path) -> None:
    said = command(hub, tmp_path, str(model), "--repo", REPO, "--token", TOKEN)
    assert said.returncode == 9
    assert "never given on the command line" in said.stderr
    assert TOKEN not in said.stderr
    none = command(hub, tmp_path, str(model), "--repo", REPO, HF_TOKEN="")
    assert (none.returncode, "no token" in none.stderr) == (9, True)
    offline = command(hub, tmp_path, str(model), "--repo", REPO, HF_HUB_OFFLINE="1")
    assert (offline.returncode, "HF_HUB_OFFLINE is set" in offline.stderr) == (9, True)
    assert hub.requests == []


def test_a_dry_run_asks_nothing(model: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    for name, content in contents(model).items():
        (tmp_path / "copy" / name).write_bytes(content)
    (tmp_path / "copy" / "training_args.bin").write_bytes(b"secret")
    done = command(
        None, tmp_path, str(tmp_path / "copy"), "--repo", REPO, "--dry-run", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "training_args.bin" in done.stdout.splitlines()[0]
    assert f"{REPO}, private, revision main" in done.stdout
    size = (model / "model.safetensors").stat().st_size
    assert f"{size:>16,}  model.safetensors" in done.stdout
