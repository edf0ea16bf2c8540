from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import Field

from lmssl.errors import RecipeError
from lmssl.recipe.base import Int, Section
from lmssl.recipe.explain import expectation, shown
from lmssl.recipe.load import load_section
from lmssl.recipe.train import TrainSection

Refusal = Callable[..., RecipeError]

# override, what, remedy
CASES = [
    # Unknown keys: near, foreign, elsewhere, of another kind, and none of these.
    ("optim.lrr=3", "there is no key optim.lrr", "did you mean optim.lr?"),
    ("optimm.lr=3", "there is no key optimm", "did you mean optim?"),
    ("optim.learning_rate=3", "there is no key optim.learning_rate", "the peak learning rate is optim.lr"),
    ("train.gradient_accumulation_steps=3", "no key train.gradient_acc", "accumulation follows from"),
    ("lr=3", "there is no key lr", "it belongs elsewhere: optim.lr"),
    ("train.sequence_length=3", "no key train.sequence_length", "it belongs elsewhere: data.sequence_length"),
    ("hidden_sizee=3", "there is no key hidden_sizee", "did you mean model.hidden_size?"),
    ("model.n_embd=4", "there is no key model.n_embd", "it belongs to kind gpt2; remove it, or change model.kind"),
    ("data.mixture.0.field=x", "there is no key data.mixture.0.field", "it belongs to kind jsonl"),
    ("data.foo=1", "there is no key data.foo", "data has sequence_length, packing"),
    ("foo=1", "there is no key foo", "the sections are name, seed"),
    ("seed.x=1", "seed is a mapping of keys; it must be a whole number", "write a whole number"),
    # Wrong types.
    ("train.tokens=true", "train.tokens is true; it must be a whole number", "write a whole number"),
    ("train.tokens=10.5", "train.tokens is 10.5; it must be a whole number", "write 10 or 11"),
    ("train.tokens=1e300", "train.tokens is 1e+300", "write a smaller number"),
    ('optim.lr="1e-4"', 'optim.lr is "1e-4"; it must be a number', "without quotes: 1e-4"),
    ("optim.lr=1,5", 'optim.lr is "1,5"; it must be a number', "without quotes: 1.5"),
    ("train.tokens=1,000,000", "it must be a whole number", "without quotes: 1000000"),
    ("optim.lr=true", "optim.lr is true; it must be a number", "write a number"),
    ("data.eos=yes", 'data.eos is "yes"; it must be true or false', "YAML 1.2 reads `yes` as text; write true"),
    ("data.eos=1", "data.eos is 1; it must be true or false", "write true or false"),
    ("name=12", "name is 12; it must be text", 'put it in quotes: "12"'),
    ("data.mixture.0.path=3", "it must be text or a list of texts", 'put it in quotes: "3"'),
    ("data.mixture.0.path=[1]", "data.mixture.0.path.0 is 1; it must be text", 'put it in quotes: "1"'),
    ("data.mixture.0.path={a: 1}", "data.mixture.0.path is a mapping of keys", "write text or a list of texts"),
    ("optim.betas=0.9", "optim.betas is 0.9; it must be a list of 2 numbers", "write a list: [0.9, <a number>]"),
    ("model.hidden_act=silo", 'model.hidden_act is "silo"', "did you mean silu?"),
    ("optim.betas=[0.9]", "optim.betas is the list [0.9]; it must be a list of 2 numbers", "a list of 2 numbers"),
    ("optim.betas=[0.9, 0.9, 0.9]", "it must be a list of 2 numbers", "a list of 2 numbers"),
    ("optim.betas=[0.9, x]", 'optim.betas.1 is "x"; it must be a number', "write a number"),
    ("track.with=wandb", 'track.with is "wandb"; it must be a list of tensorboard, wandb', "write a list: [wandb]"),
    ("track.with=[wand]", 'track.with.0 is "wand"', "did you mean wandb?"),
    ("optim=3", "optim is 3; it must be a mapping of keys", "write optim: {kind: adamw, lr: 3}"),
    ("objective=causal", 'objective is "causal"; it must be a mapping of keys', "write objective: {kind: causal}"),
    ("tokenizer=x/y", "it must be a mapping of keys", "write tokenizer: {path: x/y}"),
    ("data=null", "data is null; it must be a mapping of keys", "write data: {sequence_length: ..., mixture: ...}"),
    ("data.validation=0.1", "data.validation is 0.1", "write validation: {ratio: 0.1}"),
    ("data.validation=off", 'data.validation is "off"', "write null to switch it off"),
    ("data.mixture=x.txt", "it must be a list of mappings", "write a list: [{name: ..., kind: text, path: ...}]"),
    ("data.validation=false", "data.validation is false", "write null to switch it off"),
    ("data.validation=none", "it must be a mapping of keys or null", "write null, without quotes"),
    ("data.mixture.0={}", "the key data.mixture.0.kind is missing", "add kind: text, jsonl"),
    # Out of range.
    ("optim.lr=0", "optim.lr is 0; it must be more than 0", "more than 0 (peak learning rate)"),
    ("optim.lr=.inf", "optim.lr is inf; it must be a finite number", "a finite number"),
    ("seed=-1", "seed is -1; it must be at least 0", "write at least 0"),
    ("data.validation.ratio=1", "it must be less than 1", "write less than 1"),
    ("schedule.decay_ratio=2", "it must be at most 1", "write at most 1"),
    ("checkpoint.every_steps=0", "must be at least 1", "write null or at least 1 (null: only at the end)"),
    ("data.mixture.0.section_bytes=0", "mixture.0.section_bytes is 0; it must be at least 256", "at least 256"),
    ("data.mixture.0.section_bytes=-5", "section_bytes is -5; it must be at least 256", "null or at least 256"),
    ("data.mixture=[]", "must be a list of at least 1 item", "at least 1 item"),
    ("name=my run", "it must be letters, digits", "write my-run"),
    ("name=../..", "it must be letters, digits", "write my-run"),
    # Choices.
    ("optim.kind=lion", 'optim.kind is "lion"; it must be adamw or muon', "choose"),
    ("schedule.kind=cos", "it must be wsd, cosine, linear, inverse_sqrt or constant", "did you mean cosine?"),
    ("schedule.kind=constant_with_warmup", "it must be wsd, cosine, linear", "write constant"),
    ("data.mixture.0.kind=txt", "it must be text, jsonl, parquet", "write text"),
    ("train.precision=float16", 'train.precision is "float16"; it must be auto, bf16, fp32, fp16 or fp8', "write fp16"),
    ("train.precision=32", "train.precision is 32; it must be auto, bf16, fp32, fp16 or fp8", "write fp32"),
    ("train.compile=no", 'train.compile is "no"', "write off"),
    ("train.compile=false", "train.compile is false", "write off"),
    ("data.packing=bestfit", "it must be best_fit, concat or none", "did you mean best_fit?"),
    # Contradictions.
    ("train.batch_tokens=1000", "train.batch_tokens: 1000 is not a multiple of data.sequence_length=64", "use 1024"),
    ("optim.head_lr=1e-3", "optim.head_lr: the head is the embedding", "leave it out"),
    (
        "optim={kind: muon, lr: 1e-3, momentum_warmup: {from_momentum: 0.99, tokens: 10}}",
        "optim.momentum_warmup.from_momentum: 0.99 is more than optim.momentum=0.95",
        "lower it",
    ),
    ("data.mixture.1.weight=null", "data.mixture.1: the corpus b has no weight", "give all of them a weight, or none"),
    ("data.mixture.1.name=a", "data.mixture.1.name: a is also the name of data.mixture.0", "choose another"),
    (
        "model.hidden_size=62",
        "model.hidden_size: 62 is not a multiple of",
        "change one of them, or give model.head_dim",
    ),
]


@pytest.mark.parametrize(("override", "what", "remedy"), CASES)
def test_mistakes_name_the_value_and_the_remedy(refusal: Refusal, override: str, what: str, remedy: str) -> None:
    error = refusal(override)
    assert what in error.what
    assert remedy in str(error.remedy)
    assert error.where is not None


def test_places_in_the_file(refusal: Refusal) -> None:
    error = refusal(replace=[("lr: 3e-3", "lr: abc")])
    assert str(error.where).endswith("tiny.yaml, line 10")
    error = refusal(replace=[("optim:", "optimizer:")])
    assert str(error.where).endswith("tiny.yaml, line 10")
    assert error.what == "there is no key optimizer"
    assert "optim: {kind: adamw" in str(error.remedy)


def test_a_missing_key_names_its_section(refusal: Refusal) -> None:
    error = refusal(replace=[(", lr: 3e-3", "")])
    assert error.what == "the key optim.lr is missing (peak learning rate)"
    assert str(error.where).endswith("line 10")
    assert error.remedy == "add lr: <a number>"
    error = refusal(replace=[("objective: {kind: causal}\n", "")])
    assert error.what == "the key objective is missing"
    assert error.remedy == "add objective: {kind: causal}"
    error = refusal(replace=[("kind: adamw, ", "")])
    assert "optim.kind" in error.what and error.remedy == "add kind: adamw or muon"


def test_missing_keys_of_a_section_are_one_problem(refusal: Refusal) -> None:
    error = refusal("model.kind=gpt2")
    assert error.what == "the keys n_embd, n_layer and n_head are missing from model"
    assert error.where == "override model.kind=gpt2, which drops the file's keys of model"
    assert error.remedy == "add n_embd: <a whole number>, n_layer: <a whole number>, n_head: <a whole number>"


def test_keys_of_another_kind_are_one_problem(refusal: Refusal) -> None:
    error = refusal(replace=[("kind: llama", "kind: gpt2, n_embd: 64, n_layer: 2, n_head: 2")])
    assert error.what == "model has no keys hidden_size, intermediate_size, num_hidden_layers and num_attention_heads"
    assert error.remedy == "they belong to kind llama; remove them, or change model.kind"
    assert str(error.where).endswith("line 9")


def test_a_misspelt_required_key_is_one_problem(refusal: Refusal) -> None:
    error = refusal(replace=[("lr: 3e-3", "learning_rate: 3e-3")])
    assert error.what == "there is no key optim.learning_rate"


def test_several_problems_are_all_told_in_the_order_of_the_file(refusal: Refusal) -> None:
    error = refusal(replace=[("lr: 3e-3", "lr: x"), ("tokens: 1e5", "tokens: 0"), ("name: tiny", "name: 1")])
    assert error.what.startswith("3 things are wrong in ")
    assert error.what.index("name is 1") < error.what.index('optim.lr is "x"') < error.what.index("train.tokens is 0")
    assert error.what.count("where:") == error.what.count("remedy:") == 3


def test_many_problems_are_cut(refusal: Refusal) -> None:
    error = refusal(*(f"data.wrong{i}=1" for i in range(12)))
    assert "12 things are wrong" in error.what
    assert error.what.endswith("- and 4 more")


def test_dots_in_a_file_are_explained(refusal: Refusal) -> None:
    error = refusal(replace=[("name: tiny", "name: tiny\noptim.weight_decay: 3")])
    assert "in a file write optim: {weight_decay: ...}" in str(error.remedy)
    error = refusal(replace=[("name: tiny", "name: tiny\ndata.validation.ratio: 3")])
    assert "in a file write data: {validation: {ratio: ...}}" in str(error.remedy)


def test_long_values_are_cut_and_secrets_hidden() -> None:
    assert len(shown("x" * 500)) < 70
    assert shown("abc", "track.token") == "(hidden)"
    assert shown("hf_abcdefgh1234") == "(hidden)"
    assert shown({}) == "an empty mapping"
    assert shown(None) == "null"


def test_expectations_of_annotations() -> None:
    assert expectation(int | None) == "a whole number or null"
    assert expectation(TrainSection) == "a mapping of keys"
    assert expectation(tuple[TrainSection, ...]) == "a list of mappings"


def test_other_sections_are_explained_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    class Build(Section):
        """A section with a file of its own."""

        size: Int = Field(ge=1)

    path = tmp_path_factory.mktemp("build") / "build.yaml"
    path.write_text("size: 3\n")
    assert load_section(Build, path, ["size=4"]).size == 4
    with pytest.raises(RecipeError, match="there is no key siez") as caught:
        load_section(Build, path, ["siez=4"])
    assert caught.value.remedy == "did you mean size?"
