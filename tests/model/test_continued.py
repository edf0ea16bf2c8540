"""Models that exist: their config, their weights, rows for new tokens, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertForPreTraining, BertModel, PreTrainedModel

from lmssl.errors import LmsslError, ModelError, TokenizerError
from lmssl.model.build import build_config, build_model, build_recipe_model
from lmssl.model.continued import begin, recipe_config
from lmssl.recipe.load import load_recipe
from lmssl.recipe.model import FAMILIES
from lmssl.recipe.sections import Recipe
from lmssl.tokenizer.extension import extend_tokenizer, new_tokens
from lmssl.tokenizer.load import load_tokenizer
from runs import small_recipe, write_recipe

_BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("causal", _BERT),
    "qwen3": ("causal", _BERT | {"tie_word_embeddings": False}),
    "gpt2": ("causal", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "bert": ("masked", _BERT),
    "roberta": ("masked", _BERT),
    "electra": ("masked", _BERT | {"embedding_size": 16}),
    "modernbert": ("masked", _BERT),
    "eurobert": ("masked", _BERT),
    "distilbert": ("masked", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}),
    "t5": ("span", {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2}),
}
TOKENIZERS = {"causal": "tokenizer/bpe-4k", "masked": "tokenizer/wordpiece-8k", "span": "tokenizer/t5-8k"}


def stock(root: Path, folder: Path, kind: str, **change: Any) -> PreTrainedModel:
    """A folder as people have them: a stock model with drawn vectors too, and its tokenizer."""
    objective, sizes = KINDS[kind]
    tokenizer = load_tokenizer(root / TOKENIZERS[objective])
    section = FAMILIES[kind].model_validate({"kind": kind, **sizes, **change})
    config = build_config(
        section, objective=objective, vocab_size=tokenizer.num_tokens + 8, sequence_length=64, tokenizer=tokenizer
    )
    model = build_model(config, objective=objective, seed=3)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer.path / name, folder / name)
    return model


def recipe_of(folder: Path, kind: str = "llama", *, tokenizer: str | Path | None = None, **change: Any) -> Recipe:
    objective = KINDS[kind][0]
    content = small_recipe(folder, folder / "run", folder / "cache", **change)
    content |= {"model": {"from": str(folder), **content["model"]}, "objective": {"kind": objective}}
    content["tokenizer"]["path"] = str(tokenizer or TOKENIZERS[objective])
    for name in ("kind", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        content["model"].pop(name)
    return load_recipe(write_recipe(folder / "recipe.yaml", content)).recipe


def continued(root: Path, recipe: Recipe) -> tuple[PreTrainedModel, list[str]]:
    tokenizer, said = load_tokenizer(root / recipe.tokenizer.path), list[str]()
    model = build_recipe_model(recipe, recipe_config(recipe, tokenizer))
    begin(model, recipe, tokenizer, said.append)
    return model, said


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_and_the_logits_are_the_stock_models(root: Path, tmp_path: Path, kind: str) -> None:
    theirs = stock(root, tmp_path, kind).eval()
    random = torch.random.get_rng_state()
    ours, said = continued(root, recipe_of(tmp_path, kind))
    assert torch.random.get_rng_state().equal(random)
    named = dict(ours.named_parameters())
    assert named.keys() == dict(theirs.named_parameters()).keys()
    assert all(named[name].equal(weight) for name, weight in theirs.named_parameters())
    assert said == [f"continuing the model of {tmp_path}"]
    again = type(theirs).from_pretrained(tmp_path).eval()
    ids = torch.arange(20, 52)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :9]} if KINDS[kind][0] == "span" else {})
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(**inputs).logits, again(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "bert", "distilbert", "electra", "t5"])
def test_new_tokens_get_rows_and_old_ones_keep_theirs(root: Path, tmp_path: Path, kind: str) -> None:
    """Tied and untied heads, biases, rows that padded the old vocabulary, rows that pad the new one."""
    theirs = stock(root, tmp_path / "old", kind)
    old = load_tokenizer(tmp_path / "old")
    tokens = [f"qz{number}w" for number in range(9)]  # one more than the eight rows of padding
    new = extend_tokenizer(old.path, tmp_path / "new", tokens=tokens, special=["<|x|>"])
    ours, said = continued(root, recipe_of(tmp_path / "old", kind, tokenizer=tmp_path / "new"))
    rows = -(-new.num_tokens // 64) * 64
    assert ours.config.vocab_size == rows and "10 tokens are new to the model: '<|x|>', 'qz0w'" in said[1]
    before = dict(theirs.named_parameters())
    grown = [name for name, weight in ours.named_parameters() if weight.shape != before[name].shape]
    heads = {"llama": 1, "qwen3": 2, "gpt2": 1, "bert": 2, "distilbert": 2, "electra": 2, "t5": 1}
    assert len(grown) == heads[kind]
    added = new_tokens(old, new)
    for name, weight in ours.named_parameters():
        if name not in grown:
            assert weight.equal(before[name])
            continue
        assert weight[: old.num_tokens].equal(before[name][: old.num_tokens])
        mean = before[name][: old.num_tokens].mean(0)
        for token in added:
            expected = before[name][list(token.parts)].mean(0) if token.parts else mean
            torch.testing.assert_close(weight[token.id], expected)
        assert weight[new.num_tokens :].eq(mean).all() and len(weight) == rows
    assert weight_of_parts_differs(ours, added)


def weight_of_parts_differs(model: PreTrainedModel, added: list[Any]) -> bool:
    rows = model.get_input_embeddings().weight
    return not rows[added[1].id].equal(rows[added[0].id])


def test_new_rows_may_all_be_the_mean(root: Path, tmp_path: Path) -> None:
    theirs = stock(root, tmp_path / "old", "llama")
    num_tokens = load_tokenizer(tmp_path / "old").num_tokens
    extend_tokenizer(tmp_path / "old", tmp_path / "new", tokens=["qzw"])
    change = {"model.new_tokens": "mean"}
    ours, _ = continued(root, recipe_of(tmp_path / "old", tokenizer=tmp_path / "new", **change))
    rows = theirs.get_input_embeddings().weight
    assert ours.config.vocab_size == len(rows)  # there was room in the padding
    torch.testing.assert_close(ours.get_input_embeddings().weight[num_tokens], rows[:num_tokens].mean(0))


def test_weights_in_shards_of_bfloat16_are_taken_in_float32(root: Path, tmp_path: Path) -> None:
    model = stock(root, tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    model.bfloat16().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, _ = continued(root, recipe_of(tmp_path))
    assert all(
        p.dtype == torch.float32 and p.bfloat16().equal(q)
        for p, q in zip(ours.parameters(), model.parameters(), strict=True)
    )


def test_overrides_of_the_config(root: Path, tmp_path: Path) -> None:
    stock(root, tmp_path, "llama")
    change = {"model.dropout": 0.25, "model.rope_theta": 5e5, "data.sequence_length": 128, "model.vocab_size": 5000}
    recipe = recipe_of(tmp_path, **change)
    config = recipe_config(recipe, load_tokenizer(root / recipe.tokenizer.path))
    assert (config.attention_dropout, config.max_position_embeddings, config.vocab_size) == (0.25, 128, 5000)
    assert config.rope_parameters["rope_theta"] == 5e5
    stock(root, tmp_path / "bert", "bert")
    recipe = recipe_of(tmp_path / "bert", "bert", **{"model.dropout": 0.25})
    config = recipe_config(recipe, load_tokenizer(root / recipe.tokenizer.path))
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout) == (
        0.25,
        0.25,
        None,
    )


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gpt2", {"data.sequence_length": 128}, "sequences of 128 tokens do not fit the model's 64 positions"),
        ("roberta", {"data.sequence_length": 128}, "do not fit the model's 64 positions"),
        ("gpt2", {"model.max_position_embeddings": 128}, "has learned 64 positions, which cannot become 128"),
        ("llama", {"model.max_position_embeddings": 32}, None),
        ("gpt2", {"model.rope_theta": 1e4}, "gpt2 has no rotary positions"),
        ("llama", {"model.vocab_size": 4000}, "leave it out, or set it to at least"),
        ("llama", {"model.revision": "main"}, "a folder has no revisions"),
    ],
)
def test_overrides_that_cannot_be(
    root: Path, tmp_path: Path, kind: str, change: dict[str, Any], message: str | None
) -> None:
    stock(root, tmp_path, kind)
    with pytest.raises(LmsslError, match=message or "is less than data.sequence_length=64") as caught:
        recipe = recipe_of(tmp_path, kind, **change)
        recipe_config(recipe, load_tokenizer(root / recipe.tokenizer.path))
    assert caught.value.where and caught.value.remedy


def test_another_tokenizer_is_refused(root: Path, tmp_path: Path) -> None:
    stock(root, tmp_path, "llama")
    recipe = recipe_of(tmp_path, tokenizer="tokenizer/bpe-16k")
    with pytest.raises(TokenizerError, match="not the model's tokenizer, nor one that extends it"):
        recipe_config(recipe, load_tokenizer(root / "tokenizer/bpe-16k"))


def test_without_its_tokenizer_a_model_cannot_grow(root: Path, tmp_path: Path) -> None:
    stock(root, tmp_path, "llama")
    (tmp_path / "tokenizer.json").unlink()
    _, said = continued(root, recipe_of(tmp_path))
    assert "nobody can see whether" in said[-1]
    recipe = recipe_of(tmp_path, tokenizer="tokenizer/bpe-16k")
    with pytest.raises(ModelError, match="nobody can tell which are new"):
        recipe_config(recipe, load_tokenizer(root / "tokenizer/bpe-16k"))


def test_a_body_without_head_and_a_head_of_another_class_are_refused(root: Path, tmp_path: Path) -> None:
    model = stock(root, tmp_path, "bert")
    with pytest.raises(ModelError, match="the objective causal needs a decoder, and bert is none") as caught:
        recipe = recipe_of(tmp_path, "llama", tokenizer="tokenizer/wordpiece-8k")
        recipe_config(recipe, load_tokenizer(root / "tokenizer/wordpiece-8k"))
    assert "model.from" in str(caught.value.where)
    BertModel(model.config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="of BertForMaskedLM are not in the folder: it holds another class of bert"):
        continued(root, recipe_of(tmp_path, "bert"))


@pytest.mark.parametrize("kind", ["deberta", "deberta-v2"])
def test_a_folder_whose_attention_cannot_pack_is_refused(root: Path, tmp_path: Path, kind: str) -> None:
    stock(root, tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with pytest.raises(ModelError, match=f"{kind} cannot pack documents under its attention") as caught:
        continued(root, recipe_of(tmp_path, "bert"))
    assert "model.from" in str(caught.value.where) and "modernbert" in str(caught.value.remedy)


def test_the_sentence_head_comes_along_where_it_is_trained(root: Path, tmp_path: Path) -> None:
    model = stock(root, tmp_path, "bert")
    pair = BertForPreTraining(model.config)
    pair.save_pretrained(tmp_path)
    change = {"objective": {"kind": "masked", "sentence_task": "order"}}
    recipe = recipe_of(tmp_path, "bert")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(json.loads(path.read_text()) | change), encoding="utf-8")
    ours, _ = continued(root, load_recipe(path).recipe)
    assert type(ours) is BertForPreTraining
    assert all(p.equal(q) for p, q in zip(ours.parameters(), pair.parameters(), strict=True))
    alone, _ = continued(root, recipe)
    assert type(alone) is type(AutoModelForMaskedLM.from_pretrained(tmp_path))


def test_no_pickle_no_code_no_folder(root: Path, tmp_path: Path) -> None:
    stock(root, tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"weights are in pytorch_model.bin, which can run code"):
        continued(root, recipe_of(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no safetensors"):
        continued(root, recipe_of(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    own = config | {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(own), encoding="utf-8")
    with pytest.raises(ModelError, match="brings code of its own"):
        continued(root, recipe_of(tmp_path))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        continued(root, recipe_of(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match="no config.json"):
        continued(root, recipe_of(tmp_path))
    recipe = recipe_of(tmp_path, **{"model.from": str(tmp_path / "nowhere")})
    with pytest.raises(ModelError, match="there is no such folder"):
        recipe_config(recipe, load_tokenizer(root / recipe.tokenizer.path))


def test_a_pair_comes_from_a_folder_in_a_folder(root: Path, tmp_path: Path) -> None:
    """ELECTRA's two models as exports have them; one alone, or of another ratio, is refused."""
    stock(root, tmp_path, "electra")
    recipe = recipe_of(tmp_path, "electra")
    path = tmp_path / "recipe.yaml"
    content = json.loads(path.read_text()) | {"objective": {"kind": "replaced", "generator_ratio": 0.5}}
    built = content | {"model": {"kind": "electra", **KINDS["electra"][1]}}
    path.write_text(json.dumps(built), encoding="utf-8")
    recipe = load_recipe(path).recipe
    pair: Any = build_recipe_model(recipe, recipe_config(recipe, load_tokenizer(root / recipe.tokenizer.path)))
    pair.discriminator.save_pretrained(tmp_path)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match="a discriminator and no generator"):
        continued(root, load_recipe(path).recipe)
    pair.generator.save_pretrained(tmp_path / "generator")
    with torch.no_grad():  # what is drawn from the seed anyway must not pass for what was read
        for parameter in pair.parameters():
            parameter += 1
    for part, folder in ((pair.discriminator, tmp_path), (pair.generator, tmp_path / "generator")):
        part.save_pretrained(folder)
    ours, _ = continued(root, load_recipe(path).recipe)
    theirs = dict(pair.named_parameters())
    assert all(weight.equal(theirs[name]) for name, weight in ours.named_parameters())
    content["objective"]["generator_ratio"] = 1.0
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match="the generator is 16 wide with 2 layers, objective.generator_ratio makes one"):
        continued(root, load_recipe(path).recipe)
