from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lmssl.errors import LmsslError
from lmssl.recipe.load import Loaded, load_recipe
from lmssl.show import Number, as_json, as_text, built_model, derived_numbers

DEBUG = "recipes/debug/gpt-llama.yaml"


def loaded(root: Path, *overrides: str, recipe: str = DEBUG) -> Loaded:
    return load_recipe(root / recipe, overrides)


def numbers(loaded: Loaded) -> dict[str, Any]:
    return {number.name: number.value for number in derived_numbers(loaded.recipe)}


def test_steps_follow_from_tokens(root: Path) -> None:
    found = numbers(
        loaded(
            root,
            "train.tokens=1e5",
            "train.batch_tokens=2048",
            "train.micro_batch_sequences=3",
            "schedule.warmup_tokens=2e4",
        )
    )
    assert found["steps"] == 49  # 48.8
    assert found["batch_sequences"] == 8
    assert found["accumulation"] == 3
    assert found["warmup_steps"] == 10  # 20,000 / 2,048 = 9.8
    assert found["decay_steps"] == 10  # 20,000 as well
    cosine = numbers(loaded(root, "schedule.kind=cosine", "schedule.warmup_tokens=4096"))
    assert (cosine["warmup_steps"], cosine["decay_steps"]) == (2, 23)


def test_stages_and_skipped_positions_are_shown(root: Path) -> None:
    assert "skipped_positions" not in numbers(loaded(root))
    recipe = loaded(root)
    name = recipe.recipe.data.mixture[0].name
    changed = loaded(
        root, "data.skip=[[3, 9], [20, 21]]", f"data.stages=[{{from_tokens: 20480, weights: {{{name}: 1}}}}]"
    )
    found = numbers(changed)
    assert found["skipped_positions"] == 7
    assert found["stage_1_step"] == 9  # 20,480 / 2,048 is 10, and 7 of these 80 positions take no step
    assert "skipped_positions" in as_text(changed, derived_numbers(changed.recipe))


def test_sizes_follow_from_the_tokenizer(root: Path) -> None:
    found = numbers(loaded(root))
    assert found["vocab_size"] == 4096
    assert found["parameters"] == 1_311_872
    assert found["total_flops"] == found["flops_per_token"] * 25 * 2048
    assert found["tokens_per_parameter"] == pytest.approx(5e4 / 1_311_872)
    assert found["training_bytes"] == 16 * 1_311_872
    assert numbers(loaded(root, "tokenizer.pad_to_multiple=1000"))["vocab_size"] == 5000
    assert numbers(loaded(root, "model.vocab_size=4200", "tokenizer.path=none"))["vocab_size"] == 4200


def test_every_kind_of_tokenizer_file_gives_its_largest_id(root: Path, tmp_path: Path) -> None:
    for vocabulary, added, expected in (
        ({"a": 0, "b": 9}, [], 10),
        ({"a": 0}, [{"id": 11}], 12),
        ([["a", 0.0], ["b", -1.0], ["c", -2.0]], [], 3),
    ):
        file = {"model": {"vocab": vocabulary}, "added_tokens": added}
        (tmp_path / "tokenizer.json").write_text(json.dumps(file))
        found = numbers(loaded(root, f"tokenizer.path={tmp_path}", "tokenizer.pad_to_multiple=1"))
        assert found["vocab_size"] == expected


@pytest.mark.parametrize(
    ("content", "how"), [(None, "there is no"), ("{", "cannot be read"), ('{"model": 3}', "cannot be read")]
)
def test_without_a_tokenizer_the_rest_is_shown(root: Path, tmp_path: Path, content: str | None, how: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    this = loaded(root, f"tokenizer.path={tmp_path}")
    found = {number.name: number for number in derived_numbers(this.recipe)}
    assert found["steps"].value == 25
    assert found["vocab_size"].value is None and how in found["vocab_size"].how
    assert found["parameters"].value is None and found["total_flops"].text == "unknown"
    assert "unknown" in as_text(this, list(found.values()))


def test_other_families_have_no_formula(root: Path) -> None:
    this = loaded(root, "model={kind: olmo2, hidden_size: 64}")
    found = {number.name: number for number in derived_numbers(this.recipe)}
    assert found["vocab_size"].value == 4096
    assert found["parameters"].value is None
    assert "no formula for olmo2; --model" in found["parameters"].how


def test_the_text_shows_values_with_their_origins(root: Path) -> None:
    this = loaded(root, "optim.lr=1e-3")
    lines = as_text(this, derived_numbers(this.recipe)).split("\n")
    assert lines[0] == f"debug-llama, from {root / DEBUG}"
    rows = {tuple(line.split()) for line in lines}
    assert ("lr", "0.001", "override") in rows
    assert ("sequence_length", "256", "line", "6") in rows
    assert ("head_dim", "32", "derived") in rows
    assert ("out", "runs/debug-llama", "derived") in rows
    assert ("chunk_bytes", "null", "default") in rows
    assert ("betas", "[0.9,", "0.95]", "default") in rows
    assert ("tokens", "50_000", "line", "22") in rows
    assert not any(line.endswith(" ") for line in lines)


def test_the_text_is_aligned(root: Path) -> None:
    this = loaded(root)
    body = as_text(this, derived_numbers(this.recipe)).rpartition("\n\n")[0].split("\n")[2:]  # without the table
    starts = {line.index(line.split()[1]) for line in body if line.startswith("  ") and len(line.split()) > 2}
    assert len(starts) == 1


def test_json_holds_all_of_it(root: Path) -> None:
    this = loaded(root, "optim.lr=1e-3")
    content = json.loads(as_json(this, derived_numbers(this.recipe)))
    assert content["recipe"]["track"] == {"with": []}
    assert content["origins"]["optim.lr"] == {"kind": "override", "mark": "optim.lr=1e-3"}
    assert content["origins"]["name"] == {"kind": "file", "mark": 3}
    assert content["origins"]["optim.eps"] == {"kind": "default"}
    assert content["fields"]["out"] == "runs/debug-llama"
    assert content["derived"]["parameters"] == 1_311_872


def test_the_built_model_agrees_with_the_formula(root: Path) -> None:
    number = built_model(loaded(root).recipe).number
    assert number.value == 1_311_872
    assert number.how == "LlamaForCausalLM, built without weights, equal to the formula"


ENCODER = "hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 96"


@pytest.mark.parametrize(
    ("model", "objective", "name"),
    [
        (f"{{kind: bert, {ENCODER}}}", "masked", "BertForMaskedLM"),
        (f"{{kind: roberta, {ENCODER}}}", "masked", "RobertaForMaskedLM"),
        (f"{{kind: modernbert, {ENCODER}}}", "masked", "ModernBertForMaskedLM"),
        ("{kind: t5, d_model: 64, d_ff: 96, num_layers: 2, num_heads: 4}", "span", "T5ForConditionalGeneration"),
    ],
)
def test_encoders_are_counted_with_and_without_building(root: Path, model: str, objective: str, name: str) -> None:
    this = loaded(root, "tokenizer.path=tokenizer/wordpiece-8k", f"objective={{kind: {objective}}}", f"model={model}")
    number = built_model(this.recipe).number
    assert number.how == f"{name}, built without weights, equal to the formula"
    assert numbers(this)["parameters"] == number.value


def test_the_head_of_a_masked_model_counts_at_its_targets(root: Path) -> None:
    def flops(objective: str) -> tuple[int, str]:
        this = loaded(root, "tokenizer.path=tokenizer/wordpiece-8k", f"objective={objective}", f"model={model}")
        found = {number.name: number for number in derived_numbers(this.recipe)}
        return int(found["flops_per_token"].value or 0), found["flops_per_token"].how

    model = f"{{kind: bert, {ENCODER}}}"
    (few, note), (more, _) = flops("{kind: masked, rate: 0.1}"), flops("{kind: masked, rate: 0.2}")
    vocab_size = numbers(loaded(root, "tokenizer.path=tokenizer/wordpiece-8k"))["vocab_size"]
    last = 64 * 64 + 2 * 64 * 96  # what follows attention in the last layer
    assert more - few == pytest.approx(6 * 0.1 * (64 * (64 + vocab_size) + last), abs=6)
    assert note == "forward and backward, attention both ways, head and end of last layer at 0.1 of the tokens"
    assert flops("{kind: masked, rate: 0.3, final_rate: 0.1}")[1].endswith("at 0.2 of the tokens")


def test_positions_after_an_unknown_pad_token_are_not_counted(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / "tokenizer/wordpiece-8k/tokenizer.json", tmp_path)
    this = loaded(root, f"tokenizer.path={tmp_path}", "objective={kind: masked}", f"model={{kind: roberta, {ENCODER}}}")
    found = {number.name: number for number in derived_numbers(this.recipe)}
    assert found["parameters"].value is None and "pad token" in found["parameters"].how


def test_families_without_a_formula_are_built(root: Path) -> None:
    sizes = "hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 128"
    number = built_model(loaded(root, f"model={{kind: olmo2, {sizes}}}").recipe).number
    assert isinstance(number.value, int) and number.value > 4096 * 64
    assert "formula" not in number.how


def test_building_needs_the_tokenizer(root: Path, tmp_path: Path) -> None:
    with pytest.raises(LmsslError, match="no such tokenizer folder"):
        built_model(loaded(root, f"tokenizer.path={tmp_path / 'none'}").recipe)


def test_numbers_as_people_read_them() -> None:
    assert Number("x", 12345, "").text == "12,345"
    assert Number("x", 3 * 10**17, "").text == "3.000e+17"
    assert Number("x", 19.8123, "").text == "19.8"
    assert Number("x", None, "").text == "unknown"


def test_shipped_tokenizers_are_read_from_anywhere(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(root / DEBUG, tmp_path / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    assert numbers(load_recipe(Path("mine.yaml")))["vocab_size"] == 4096


def test_parameters_are_shown_by_role(root: Path) -> None:
    this = loaded(root, "optim={kind: muon, lr: 0.02, adamw_lr: 3e-3, embedding_lr: 0.01}")
    table = as_text(this, derived_numbers(this.recipe)).split("\n\n")[-1].splitlines()
    assert [line.split() for line in table] == [
        ["parameters", "tensors", "count", "optimizer", "peak", "lr", "weight", "decay"],
        ["matrix", "28", "786,432", "muon", "0.02", "0.1"],
        ["embedding", "1", "524,288", "adamw", "0.01", "0.1"],
        ["vector", "9", "1,152", "adamw", "0.003", "0"],
    ]
    assert json.loads(as_json(this, []))["parameters"]["head"] == {
        "tensors": 0,
        "parameters": 0,
        "optimizer": "adamw",
        "peak_lr": 0.003,
        "weight_decay": 0.1,
    }
    assert numbers(this)["training_bytes"] == 16 * 1_311_872 - 4 * 786_432  # muon has one state


def test_parameters_of_other_families_are_counted_on_the_built_model(root: Path) -> None:
    sizes = "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2"
    this = loaded(root, f"model={{kind: olmo2, {sizes}}}")
    assert "matrix     unknown" in as_text(this, [])
    counts = built_model(this.recipe).counts
    assert counts["matrix"].num_tensors == 14
    assert json.loads(as_json(this, [], counts))["parameters"]["matrix"]["tensors"] == 14
