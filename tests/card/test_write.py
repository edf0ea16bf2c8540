"""A card tells what was trained, from what the run's folder holds, and lets nobody's text do harm."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lmssl import checkpoint
from lmssl.card import write_card
from lmssl.card.cost import cost, rated_watts, training_flops
from lmssl.card.curve import loss_curve
from lmssl.card.facts import Facts
from lmssl.card.markdown import escaped, fenced, table
from lmssl.recipe.load import load_recipe, resolved_yaml
from runs import small_recipe, write_recipe

WEIGHTS = {"ema": False, "average": 1, "dtype": "float32"}
LEDGER = {
    "format": 1,
    "stages": [
        {"first_position": 0, "corpora": ["novels", "peps"], "shares": [3, 1]},
        {"first_position": 60, "corpora": ["novels", "peps"], "shares": [0, 1]},
    ],
}
WINDOWS = [
    {"corpus": "novels", "epoch": 0, "num_bad": 2, "num_dropped_short": 1200, "num_dropped_duplicates": 0},
    {"corpus": "peps", "epoch": 0, "num_bad": 1, "num_dropped_short": 0, "num_dropped_duplicates": 34},
    {"corpus": "peps", "epoch": 1, "num_bad": 1, "num_dropped_short": 0, "num_dropped_duplicates": 5},
]
CONFIG = {"model_type": "llama", "hidden_size": 64, "vocab_size": 4096, "tie_word_embeddings": True}
SESSION = {
    "started": "2026-01-01T00:00:00Z",
    "from_step": 0,
    "device": "NVIDIA H200",
    "processes": 8,
    "threads": 4,
    "versions": {"torch": "2.13.0", "a|b": "[x](http://y)"},
}


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def train_row(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "tokens": 1024 * step, "loss": loss, "time": {"seconds": 1800.0}}


@pytest.fixture
def facts(tmp_path: Path, root: Path) -> Facts:
    """A run folder written by hand."""
    run = tmp_path / "run"
    path = run / "checkpoints" / "step-00000004"
    path.mkdir(parents=True)
    changes = {
        "card": {"license": "apache-2.0", "languages": ["en"]},
        "data.mixture": [
            {"name": "novels", "kind": "text", "path": "/nas/ann/novels/*.txt", "weight": 0.75},
            {"name": "peps", "kind": "text", "path": ["corpora/peps/*.txt"], "weight": 0.25},
        ],
    }
    recipe = small_recipe(tmp_path, Path("/nas/ann/run"), Path("~/secret/cache"), **changes)
    (path / "recipe.yaml").write_text(resolved_yaml(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)).recipe))
    state = {"step": 4, "tokens_seen": 4096, "cursor": 80, "skipped_steps": 1, "epochs": {"novels": 0.5}}
    state["evaluation"] = {"step": 4, "loss": 3.21, "bits_per_byte": 1.5}
    (path / "state.json").write_text(json.dumps(state))
    (path / "ledger.jsonl").write_text(lines(LEDGER, *WINDOWS))
    (path / "config.json").write_text(json.dumps(CONFIG))
    (run / "tokenizer").symlink_to(root / "tokenizer" / "bpe-4k")
    (run / "sessions.jsonl").write_text(lines(SESSION))
    guard = {"kind": "guard", "step": 3, "action": "skip", "reason": "spike | `x`", "positions": [32, 47]}
    (run / "metrics.jsonl").write_text(
        lines(train_row(2, 4.0), guard, train_row(4, 3.5), train_row(6, 99.0)) + '{"kind": "tr'
    )
    pairs = {"kind": "minimal_pairs", "name": "be_agree", "step": 4, "metrics": {"accuracy": 0.75, "num_asked": 80}}
    stale = {"kind": "minimal_pairs", "name": "be_agree", "step": 4, "metrics": {"accuracy": 0.1}, "time": "before"}
    (run / "evaluations.jsonl").write_text(lines(stale, pairs, {**pairs, "step": 6}))
    return Facts(run, checkpoint.Checkpoint(path, 4), 344_384, WEIGHTS)


def card_of(facts: Facts, folder: Path) -> ModelCard:
    folder.mkdir(exist_ok=True)
    write_card(folder, facts)
    return ModelCard.load(folder / "README.md")


def test_the_front_matter_is_what_the_hub_reads(facts: Facts, tmp_path: Path) -> None:
    data = card_of(facts, tmp_path / "out").data
    assert (data.license, data.language, data.pipeline_tag) == ("apache-2.0", ["en"], "text-generation")
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert results == {
        ("held-out text of the training corpora", "loss"): 3.21,
        ("held-out text of the training corpora", "bits_per_byte"): 1.5,
        ("be_agree", "accuracy"): 0.75,
    }


def test_the_text_tells_all(facts: Facts, tmp_path: Path) -> None:
    text = card_of(facts, tmp_path / "out").text
    for wanted in (
        "344,384 parameters",
        "| novels | text | 0.75 | 0.50 | 56.25% |",  # 45 of the 80 positions: three quarters of the first 60
        "| peps | text | 0.25 | unknown | 43.75% |",
        "4,096 tokens in 4 steps",
        "3 records were unreadable, and filters left out 1,234 documents: 1,200 too short, 34 duplicates.",
        "loss 3.2100 nats per token, 1.5000 bits per byte",
        r"| minimal\_pairs | be\_agree | accuracy | 0.7500 |",
        r"| 3 | skip | spike \| \`x\` | 32 to 47 |",
        r"| devices | 8 x NVIDIA H200 |",
        "| hours | 1 |",
        "6.72 kWh at 700 W a device all the time, times 1.2",
        r"a\|b \[x\]\(http://y\)",
        "Tokenizer: BPE, 4,096 tokens",
        "![Loss over training tokens](training_curve.svg)",
        'path: ".../*.txt"',
        "corpora/peps/*.txt",
    ):
        assert wanted in text, wanted
    assert "ann" not in text.replace("planned", "")
    assert "secret" not in text


def test_averaged_and_rounded_weights_claim_no_results(facts: Facts, tmp_path: Path) -> None:
    averaged = Facts(facts.run, facts.found, 10, {"ema": False, "average": 5, "dtype": "bfloat16"})
    card = card_of(averaged, tmp_path / "out")
    assert card.data.eval_results is None
    assert "mean of those of the last 5 checkpoints, up to step 4" in card.text
    assert "rounded to bfloat16" in card.text
    assert "those of the weights as they were trained" in card.text
    assert "be_agree" not in card.text


def test_rounded_weights_claim_no_results_of_others(facts: Facts, tmp_path: Path) -> None:
    rounded = Facts(facts.run, facts.found, 10, {**WEIGHTS, "dtype": "float16"})
    card = card_of(rounded, tmp_path / "out")
    assert card.data.eval_results is None
    assert "All numbers are those of the weights in float32, before they were rounded to float16" in card.text
    assert "of the exported weights" not in card.text
    assert r"| be\_agree | accuracy | 0.7500 |" in card.text


def test_a_row_with_line_separators_of_unicode_is_read(facts: Facts, tmp_path: Path) -> None:
    row = {"kind": "loss", "name": "a\u2028b\u0085c", "step": 4, "metrics": {"loss": 2.5}}
    with (facts.run / "evaluations.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    assert row in facts.evaluations


def test_results_of_the_moving_average_stand_on_its_own_card(facts: Facts, tmp_path: Path) -> None:
    with (facts.run / "evaluations.jsonl").open("a") as file:
        row = {"kind": "loss", "name": "of-averages", "step": facts.found.step, "metrics": {"loss": 2.5}}
        file.write(lines({**row, "weights": "ema"}))
    raw = card_of(facts, tmp_path / "raw")
    averaged = card_of(Facts(facts.run, facts.found, 10, {**WEIGHTS, "ema": True}), tmp_path / "ema")
    assert "of-averages" not in raw.text
    assert [result.dataset_name for result in averaged.data.eval_results or []] == ["of-averages"]
    assert "be_agree" not in averaged.text


def test_what_is_unknown_is_not_invented(facts: Facts, tmp_path: Path) -> None:
    (facts.run / "sessions.jsonl").write_text(lines({**SESSION, "device": "cpu", "processes": 1}))
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (facts.run / name).unlink()
    (facts.found.path / "ledger.jsonl").write_text("")
    text = card_of(Facts(facts.run, facts.found, 1, WEIGHTS), tmp_path / "out").text
    assert "not estimated: the power of the device is not known" in text
    assert "| hours | unknown |" in text
    assert "| novels | text | 0.75 | 0.50 | unknown |" in text
    assert not (tmp_path / "out" / "training_curve.svg").exists()
    assert "training_curve" not in text
    assert "unreadable" not in text


def test_another_machine_in_between_leaves_no_energy(facts: Facts) -> None:
    assert cost(facts).kilowatt_hours == pytest.approx(1 * 8 * 700 * 1.2 / 1000)
    (facts.run / "sessions.jsonl").write_text(lines(SESSION, {**SESSION, "from_step": 2, "device": "NVIDIA L4"}))
    found = cost(Facts(facts.run, facts.found, 1, WEIGHTS))
    assert (found.kilowatt_hours, found.devices) == (None, "8 x NVIDIA L4 at the end; others before")


def test_operations_follow_the_tokens(facts: Facts) -> None:
    found = training_flops(facts)
    assert found is not None
    body, head = 2 * (4 * 64 * 64 + 3 * 64 * 128), 64 * 4096
    assert found == pytest.approx(6 * (body + head) * 4096, rel=0.05)


@pytest.mark.parametrize(
    ("device", "watts"),
    [("NVIDIA H100 80GB HBM3", 700), ("NVIDIA H100 PCIe", 350), ("NVIDIA A100-SXM4-80GB", 400), ("NVIDIA L40", None)],
)
def test_power_by_name(device: str, watts: int | None) -> None:
    assert rated_watts(device) == watts


def test_the_curve_is_a_picture_of_numbers() -> None:
    training = [(1e6 * k, 3 + 5 / k) for k in range(1, 5000)] + [(6e9, float("nan"))]
    picture = loss_curve(training, [(1e9, 4.0), (4e9, 3.2)], title="a <b> & c")
    assert picture is not None
    assert len(picture) < 20_000
    tree = ElementTree.fromstring(picture)
    assert tree.find("{http://www.w3.org/2000/svg}title").text == "a <b> & c"  # type: ignore[union-attr]
    points = [
        p.split(",")
        for line in tree.iter("{http://www.w3.org/2000/svg}polyline")
        for p in line.get("points", "").split()
    ]
    assert all(64 <= float(x) <= 700 and 44 <= float(y) <= 348 for x, y in points)
    assert loss_curve([(1, 2.0)], [], title="") is None
    assert loss_curve([(0, 2.0), (5, 2.0)], [], title="") is not None


def test_names_stay_names() -> None:
    assert escaped("a\nb\x1b[31m") == r"a b \[31m"
    assert table(["x"], [["<img src=y>"]]).splitlines()[-1] == r"| \<img src=y\> |"
    assert fenced("a ````b", "yaml").startswith("`````yaml\n")
