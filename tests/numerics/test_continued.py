"""Runs that begin with a model that exists: from an export, from a run, with more tokens, on other text."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from lmssl import checkpoint
from lmssl.data.batch import SequenceBatch
from lmssl.data.stream import SequenceStream
from lmssl.export import export_run
from lmssl.objective.build import build_objective
from lmssl.recipe.load import load_recipe
from lmssl.show import as_text, derived_numbers
from lmssl.tokenizer.extension import extend_tokenizer
from lmssl.tokenizer.load import load_tokenizer
from lmssl.train.run import train
from runs import metrics, small_recipe, write_recipe
from sequences import segments_of

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MASKED = {
    "tokenizer": {"path": "tokenizer/wordpiece-8k"},
    "model": {"kind": "bert", **SIZES},
    "objective": {"kind": "masked"},
}


def run(folder: Path, text: Path, label: str, /, *, steps: int = 6, **change: Any) -> Path:
    change = {"model": {"kind": "llama", **SIZES}, "train.precision": "fp32", **change}
    content = small_recipe(text, folder / label, folder / "cache", steps=steps, **change)
    return train(load_recipe(write_recipe(folder / f"{label}.yaml", content)))


def evaluations(path: Path) -> list[float]:
    return [row["loss"] for row in metrics(path) if row["kind"] == "evaluate"]


def export(path: Path) -> Path:
    return export_run(path, None, path.with_name(path.name + "-export"), lambda _: None).path


def stock_loss(path: Path, folder: Path) -> float:
    """Nats per target of the stock class on each held-out document of a run by itself."""
    recipe, tokenizer = load_recipe(path / "recipe.yaml").recipe, load_tokenizer(path / "tokenizer")
    stream = SequenceStream.open(recipe.data, tokenizer, recipe.data_seed, Path(recipe.data.cache))
    (split,) = stream.validation()
    rows = SequenceBatch.of([(i, split.window, i) for i in range(split.num_sequences)], split.window.layout)
    objective: Any = build_objective(recipe, tokenizer, num_positions=1000)
    micro = objective.prepare(rows, evaluation=True)
    masked = recipe.objective.kind == "masked"
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    labels = torch.from_numpy(rows.ids_BT)
    if masked:
        labels = torch.full_like(labels, -100)
        labels.scatter_(1, micro.inputs["places_BC"], micro.inputs["targets_BC"])
    nats = targets = 0.0
    for row, _, place in segments_of(rows):
        wanted = labels[row][place][None]
        count = int((wanted if masked else wanted[:, 1:]).ne(-100).sum())
        if count:
            with torch.no_grad():
                nats += float(model(input_ids=micro.inputs["ids_BT"][row][place][None], labels=wanted).loss) * count
            targets += count
    return nats / targets


@pytest.mark.parametrize("change", [{}, pytest.param(MASKED, marks=pytest.mark.slow)], ids=["causal", "masked"])
def test_the_first_evaluation_is_the_stock_models_loss_on_the_same_text(
    tmp_path: Path, text_folder: Path, change: dict[str, Any]
) -> None:
    first = run(tmp_path, text_folder, "first", **change)
    folder = export(first)
    second = run(tmp_path, text_folder, "second", steps=4, **{**change, "model": {"from": str(folder)}})
    assert evaluations(second)[0] == evaluations(first)[-1]
    assert evaluations(second)[0] == pytest.approx(stock_loss(second, folder), rel=1e-5)
    assert evaluations(second)[-1] < evaluations(second)[0]
    card = (export(second) / "README.md").read_text()
    assert "pretrained further, from the weights of first" in card


def test_a_run_folder_is_taken_at_its_newest_checkpoint_and_needed_only_once(
    tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = {"checkpoint": {"every_steps": 3, "keep_last": 5}, "schedule": {"kind": "constant"}}
    first = run(tmp_path, text_folder, "first", steps=6, **change)
    change["model"] = {"from": str(first)}
    second = run(tmp_path, text_folder, "second", steps=3, **change)
    assert evaluations(second)[0] == evaluations(first)[-1]
    assert "continuing the model of" in capsys.readouterr().out
    (about,) = [json.loads(line) for line in (second / "sessions.jsonl").read_text().splitlines()]
    assert about["model_from"].endswith("first/checkpoints/step-00000006")
    shown = as_text(
        load_recipe(tmp_path / "second.yaml"), derived_numbers(load_recipe(tmp_path / "second.yaml").recipe)
    )
    assert "148,640" in shown and "rows of the model that is continued" in shown
    shutil.rmtree(first / "checkpoints/step-00000006")
    earlier = run(tmp_path, text_folder, "earlier", steps=3, **change)
    assert evaluations(earlier)[0] != evaluations(second)[0]
    shutil.rmtree(first)
    gone = run(tmp_path, text_folder, "second", steps=6, **change)
    assert checkpoint.find_step(gone, None).step == 6
    assert (gone / "sessions.jsonl").read_text().count("model_from") == 1


def test_new_tokens_are_learned_and_exported(tmp_path: Path, text_folder: Path, root: Path) -> None:
    first = run(tmp_path, text_folder, "first")
    folder = tmp_path / "longer"
    extended = extend_tokenizer(first / "tokenizer", folder, tokens=["Licensor", "contributors"], special=["<|user|>"])
    (tmp_path / "text").mkdir()
    for number in range(3):
        text = "\n\n".join(
            f"The Licensor and contributors of part {k}." for k in range(number * 200, number * 200 + 200)
        )
        (tmp_path / "text" / f"{number}.txt").write_text(text, encoding="utf-8")
    change = {"model": {"from": str(first)}, "tokenizer": {"path": str(folder)}}
    second = run(tmp_path, tmp_path / "text", "second", steps=8, **change)
    out = export(second)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = [extended.num_tokens - 3 + k for k in range(3)]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "Licensor", "contributors"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size >= extended.num_tokens
    with torch.no_grad():
        logits = model(**tokenizer("The ", return_tensors="pt")).logits[0, -1]
    assert logits[ids[1]] > logits[ids[0]] + 1  # one was in the text, the other was not


def test_warming_up_again_with_replay_forgets_less(tmp_path: Path, root: Path) -> None:
    """The shipped recipe on tiny models: text of other words is learned, and the old text kept where it is replayed."""
    random = np.random.Generator(np.random.Philox(key=3))
    old, new = ([f"{a}{b}" for a in first for b in ("ka", "lo", "mi", "ter", "so")] for first in ("bdfg", "prtv"))
    for name, words in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        for number in range(2):
            text = "\n\n".join(" ".join(random.choice(words, 24)) for _ in range(150))
            (tmp_path / name / f"{number}.txt").write_text(text, encoding="utf-8")
    before = run(tmp_path, tmp_path / "old", "before", steps=40, **{"optim.lr": 1e-2})

    def corpus(name: str, weight: float) -> dict[str, Any]:
        path = str(tmp_path / name / "*.txt")
        return {"name": name, "kind": "text", "path": path, "document": "paragraph", "weight": weight}

    def losses(replay: float) -> dict[str, float]:
        mixture = [corpus("new", 1 - replay), *([corpus("old", replay)] if replay else [])]
        held_out = {key: value for key, value in corpus("old", 0).items() if key != "weight"} | {"name": "held"}
        overrides = [
            f"out={tmp_path / f'replay-{replay}'}",
            f"model.from={before}",
            f"tokenizer.path={before / 'tokenizer'}",
            f"data.mixture={json.dumps(mixture)}",
            f"data.validation={json.dumps({'ratio': 0.1, 'tokens': 2000, 'sets': [held_out]})}",
            f"data.cache={tmp_path / 'cache'}",
            *("data.sequence_length=64", "data.workers=0", "schedule.warmup_tokens=2048", "optim.lr=1e-2"),
            *("train.tokens=30720", "train.batch_tokens=1024", "train.micro_batch_sequences=8", "train.compile=off"),
            *("train.precision=fp32", "train.log_every_steps=1"),
        ]
        path = train(load_recipe(root / "recipes/continue/gpt-domain.yaml", overrides))
        rows = [row for row in metrics(path) if row["kind"] == "evaluate"]
        assert rows[-1]["corpora"]["new"]["loss"] < rows[0]["corpora"]["new"]["loss"] - 1
        rates = [row["lr"] for row in metrics(path) if row["kind"] == "train"]
        assert rates[0] < 1e-2 and rates[-1] < 5e-3
        return {"before": rows[0]["sets"]["held"]["loss"], "after": rows[-1]["sets"]["held"]["loss"]}

    without, replayed = losses(0.0), losses(0.25)
    assert without["before"] == replayed["before"]
    assert without["after"] > without["before"] + 0.5
    assert replayed["after"] < without["before"] + 0.5 * (without["after"] - without["before"])


@pytest.mark.parametrize("name", ["gpt-domain", "bert-domain"])
def test_the_shipped_recipes_read(root: Path, name: str) -> None:
    recipe = load_recipe(root / f"recipes/continue/{name}.yaml").recipe
    assert recipe.schedule.warmup_tokens == 0.02 * recipe.train.tokens
    numbers = {number.name: number for number in derived_numbers(recipe)}
    assert numbers["parameters"].value is None


@pytest.mark.slow
def test_two_processes_begin_with_the_same_weights(tmp_path: Path, text_folder: Path) -> None:
    """The weights exist before the backend does."""
    change = {"model": {"kind": "llama", **SIZES}, "train.precision": "fp32"}
    first = run(tmp_path, text_folder, "first", **change)
    change |= {"model": {"from": str(first)}, "data.packing": "none"}
    one = run(tmp_path, text_folder, "one", steps=3, **change)
    content = small_recipe(text_folder, tmp_path / "two", tmp_path / "cache", steps=3, **change)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [*command, "-m", "lmssl", "train", str(write_recipe(tmp_path / "two.yaml", content))],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert evaluations(tmp_path / "two")[0] == pytest.approx(evaluations(one)[0], rel=1e-6)
    a, b = (checkpoint.find_step(path, None).tensors("model") for path in (one, tmp_path / "two"))
    assert all(torch.allclose(tensor, b[name], rtol=1e-4, atol=1e-5) for name, tensor in a.items())


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
