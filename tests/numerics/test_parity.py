"""Every backend trains the run that one process trains, and continues what any other has saved.

Two processes on CPU, paragraphs one by one in short rows, so that the ranks' target counts differ; three micro-batches
a step, a clipped gradient, averages of the weights. Launched as a user would, by `accelerate launch` and the files of
recipes/launch; FSDP2 with the shim of fsdp_cpu.py.
"""

from __future__ import annotations

import json
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from launched_runs import HALF, STEPS, assert_same_run, launch, recipe_of, run_segments
from lmssl import checkpoint
from lmssl.checkpoint import checkpoints_path
from lmssl.export import export_run
from lmssl.recipe.load import load_recipe
from lmssl.train.run import train
from runs import metrics, small_recipe, tensors_of, write_lines, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FILES = {
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "zero1": "zero1",
    "zero2": "zero2",
    "zero3": "zero3",
    "zero2-offload": "zero2-offload",
    "zero3-offload": "zero3-offload",
}
"""What two processes are launched with. HSDP needs four: accelerate wants more than one shard."""
RESHARDED = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")


ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDPIECE = {"tokenizer": {"path": "tokenizer/wordpiece-8k"}}
FAMILIES: dict[str, dict[str, Any]] = {
    "untied": {"model": {"kind": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False}},
    "bert": WORDPIECE | {"objective": {"kind": "masked"}, "model": {"kind": "bert", **ENCODER}},
    "electra": WORDPIECE
    | {"objective": {"kind": "replaced"}, "model": {"kind": "electra", "embedding_size": 16, **ENCODER}},
    "t5": {
        "tokenizer": {"path": "tokenizer/t5-8k"},
        "objective": {"kind": "span"},
        "model": {"kind": "t5", "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2},
    },
}
"""Weights outside of layers that are read in many ways: tied and not, by two models, by two stacks."""


LIKELY = ("untied", "bert")
"""Families that say how likely a text is, which a suite asks."""


def suite_of(folder: Path) -> Path:
    """Odd numbers of rows, so that ranks have different shares of them."""
    text = write_lines(
        folder / "text.jsonl", [{"text": "The for statement is used to iterate. " * n} for n in (1, 2, 5)]
    )
    verbs = [("are", "is"), ("is", "are"), ("are", "is")] * 3
    pairs = [
        {"sentence_good": f"The {n} cats {good} here.", "sentence_bad": f"The {n} cats {bad} here."}
        for n, (good, bad) in enumerate(verbs)
    ]
    path, asked = folder / "suite.yaml", write_lines(folder / "pairs.jsonl", pairs)
    path.write_text(
        f"""evaluations:
  - {{name: text, kind: loss, corpus: {{name: text, kind: jsonl, path: {text}}}, context_tokens: 32}}
  - {{name: pairs, kind: minimal_pairs, path: {asked}}}
""",
        encoding="utf-8",
    )
    return path


def assert_exported_as_saved(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, by name; ELECTRA's generator lies in a folder inside the export, with what both models read."""
    # Without the fresh process, which compares an export with the model that was loaded: tests/export has that.
    monkeypatch.setattr("lmssl.export.folder.verify", lambda *_, **__: 0.0)
    out = run.with_name(f"{run.name}-export")
    export_run(run, None, out, lambda _: None)
    saved = tensors_of(checkpoint.find_step(run, None), "model")
    exported = load_file(out / "model.safetensors")
    if (out / "generator").exists():
        exported = {f"discriminator.{name}": tensor for name, tensor in exported.items()}
        inner = load_file(out / "generator" / "model.safetensors")
        exported |= {f"generator.{name}": tensor for name, tensor in inner.items()}
        shared = exported.keys() - saved.keys()
        assert shared, "the embeddings are saved once"
        assert all(any(exported[name].equal(tensor) for tensor in saved.values()) for name in shared)
        exported = {name: tensor for name, tensor in exported.items() if name not in shared}
    assert exported.keys() == saved.keys()
    assert all(exported[name].equal(saved[name]) for name in saved)


def family_recipe(folder: Path, text: Path, name: str) -> Path:
    changes: dict[str, Any] = {"data.packing": "none", "train.precision": "fp32", "train.micro_batch_sequences": 5}
    changes |= {"train.batch_tokens": 64 * 24, "train.tokens": 64 * 24 * 6, "evaluate.every_steps": 3}
    changes |= {"evaluate.samples": {"max_new_tokens": 12, "temperature": 0}}
    family = name.split("-")[0]
    changes |= FAMILIES[family]
    if family in LIKELY:
        changes["evaluate.suite"] = str(suite_of(folder))
    recipe = small_recipe(text, folder / name, text.parent / "parity-cache", steps=6, **changes)
    return write_recipe(folder / f"{name}.yaml", recipe)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """Where runs lie; `single` is that of one process."""
    folder = tmp_path_factory.mktemp("parity")
    train(load_recipe(recipe_of(folder, text_folder, "single")))
    return folder


@pytest.fixture(scope="module")
def launched(runs: Path, text_folder: Path, root: Path) -> dict[str, Path]:
    """Runs by backend, launched when they are asked for."""
    return {"single": runs / "single"}


def run_under(backend: str, runs: Path, launched: dict[str, Path], text_folder: Path, root: Path) -> Path:
    if backend not in launched:
        launch(root, FILES[backend], recipe_of(runs, text_folder, backend))
        launched[backend] = runs / backend
    return launched[backend]


@pytest.mark.parametrize("backend", FILES)
def test_two_processes_equal_one(
    backend: str, runs: Path, launched: dict[str, Path], text_folder: Path, root: Path
) -> None:
    theirs = run_under(backend, runs, launched, text_folder, root)
    assert_same_run(launched["single"], theirs, loss=5e-6, weights=2e-5)


@pytest.mark.parametrize("backend", RESHARDED)
def test_what_each_backend_saved_is_exported(
    backend: str,
    runs: Path,
    launched: dict[str, Path],
    text_folder: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_exported_as_saved(run_under(backend, runs, launched, text_folder, root), monkeypatch)


def test_bfloat16_equals_one_process_as_far_as_it_rounds(runs: Path, text_folder: Path) -> None:
    folder, bf16 = runs / "bf16", {"train.precision": "bf16"}
    folder.mkdir()
    train(load_recipe(recipe_of(folder, text_folder, "single", **bf16)))
    backends = ("ddp", "fsdp2", "zero2", "zero3")
    plan = [{"backend": name, "recipe": str(recipe_of(folder, text_folder, name, **bf16))} for name in backends]
    run_segments(folder / "plan.json", plan)
    for backend in backends:
        assert_same_run(folder / "single", folder / backend, loss=5e-4, weights=5e-3)


def test_four_processes_in_two_replicas_equal_one(runs: Path, text_folder: Path, root: Path) -> None:
    """2 x 2: weights are divided and there are copies of each part."""
    recipe = recipe_of(runs, text_folder, "hsdp-2x2", **{"train.micro_batch_sequences": 3})
    launch(root, "fsdp2-hybrid", recipe, "--parallelism_config_dp_shard_size", "2", processes=4)
    assert_same_run(runs / "single", runs / "hsdp-2x2", loss=5e-6, weights=2e-5)


def test_any_backend_continues_what_any_other_saved(
    runs: Path, launched: dict[str, Path], text_folder: Path, root: Path
) -> None:
    """Step 10 as saved under A, continued under B, is at step 20 what an uninterrupted run is: all 30 ordered pairs.

    Where A is one process, B also begins a step and drops it, and makes one without its update.
    """
    pairs = list(permutations(RESHARDED, 2))
    for before, after in pairs:
        run = shutil.copytree(run_under(before, runs, launched, text_folder, root), runs / f"{before}-to-{after}")
        shutil.rmtree(checkpoints_path(run) / f"step-{STEPS:08d}")
        recipe_of(runs, text_folder, run.name)
    plan = [
        {"backend": after, "recipe": str(runs / f"{before}-to-{after}.yaml"), "disturb": before == "single"}
        for before, after in pairs
        if after != "single"
    ]
    run_segments(runs / "plan.json", plan)
    for before, after in pairs:
        run = runs / f"{before}-to-{after}"
        if after == "single":
            train(load_recipe(runs / f"{run.name}.yaml"))
        sessions = (run / "sessions.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(sessions[-1])["from_step"] == HALF
        assert_same_run(launched["single"], run, loss=5e-6, weights=2e-5)


@pytest.mark.parametrize("before", ["single", "zero3"])
def test_loading_and_saving_change_no_bit(
    before: str, runs: Path, launched: dict[str, Path], text_folder: Path, root: Path
) -> None:
    """What each backend would save, having loaded another's step 10, is that: weights, states, counts, averages."""
    source = run_under(before, runs, launched, text_folder, root)
    plan = []
    for backend in (*FILES, "hsdp"):
        run = shutil.copytree(source, runs / f"{before}-as-{backend}")
        shutil.rmtree(checkpoints_path(run) / f"step-{STEPS:08d}")
        recipe = recipe_of(runs, text_folder, run.name, **{"train.micro_batch_sequences": 3})
        plan.append({"backend": backend, "recipe": str(recipe), "exact": True})
    run_segments(runs / "exact.json", plan[:-1])
    run_segments(runs / "exact.json", plan[-1:], processes=4)


def test_every_family_is_divided_well(runs: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads weights outside of layers reads whole ones: six steps of each family under what divides weights.

    The texts that are written meanwhile are the same, too, and the answers to a suite; exports hold what was saved.
    """
    names = [f"{family}-{backend}" for family in FAMILIES for backend in ("fsdp2", "zero3")]
    plan = [{"backend": n.split("-")[1], "recipe": str(family_recipe(runs, text_folder, n))} for n in names]
    run_segments(runs / "families.json", plan)
    for family in FAMILIES:
        train(load_recipe(family_recipe(runs, text_folder, family)))
        for name in (f"{family}-fsdp2", f"{family}-zero3"):
            ours, theirs = (checkpoint.find_step(runs / run, None) for run in (family, name))
            first, second = tensors_of(ours, "model"), tensors_of(theirs, "model")
            assert first.keys() == second.keys()
            found = max(float((first[key] - second[key]).abs().max()) for key in first)
            print(f"{name}: {found:.1e}")
            assert found < 1e-4, name
            for a, b in zip(metrics(runs / family), metrics(runs / name), strict=True):
                assert (b["kind"], b["step"], b.get("samples")) == (a["kind"], a["step"], a.get("samples")), name
                if "loss" in a:
                    assert b["loss"] == pytest.approx(a["loss"], rel=2e-5), name
                if a["kind"] == "suite":
                    assert b["name"] == a["name"]
                    assert b["metrics"] == pytest.approx(a["metrics"], rel=2e-5), name
            if family != "untied":
                assert_exported_as_saved(runs / name, monkeypatch)
        asked = [(row["step"], row["name"]) for row in metrics(runs / family) if row["kind"] == "suite"]
        asked = [(step, name) for step, name in asked if name != "samples"]
        assert asked == [(n, name) for n in (0, 3, 6) for name in ("text", "pairs") if family in LIKELY]


MUON: dict[str, Any] = {
    "optim": {
        "kind": "muon",
        "lr": 3e-3,
        "max_grad_norm": 0.5,
        "momentum_warmup": {"from_momentum": 0.8, "tokens": 64 * 24 * 15},
    }
}


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_muon_divided_over_two_processes_equals_one(backend: str, runs: Path, text_folder: Path, root: Path) -> None:
    """Two processes divide it (DDP: momentum and work; FSDP2: work) and continue what one has saved, and one theirs."""
    folder = runs / "muon"
    folder.mkdir(exist_ok=True)
    if not (folder / "single").exists():
        train(load_recipe(recipe_of(folder, text_folder, "single", **MUON)))
    launch(root, FILES[backend], recipe_of(folder, text_folder, backend, **MUON))
    for before, after in ((backend, "single"), ("single", backend)):
        run = shutil.copytree(folder / before, folder / f"{before}-to-{after}")
        shutil.rmtree(checkpoints_path(run) / f"step-{STEPS:08d}")
        recipe = recipe_of(folder, text_folder, run.name, **MUON)
        if after == "single":
            train(load_recipe(recipe))
        else:
            launch(root, FILES[backend], recipe)
    for name in (backend, f"{backend}-to-single", f"single-to-{backend}"):
        assert_same_run(folder / "single", folder / name, loss=5e-6, weights=2e-5)
