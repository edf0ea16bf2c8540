"""Configs and initial weights from a recipe's model section."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from transformers.activations import ACT2FN

from kinds import MASKED, SPAN, VOCAB, Tokens, tiny
from lmssl.errors import ModelError
from lmssl.model.build import build_config, build_model, check_masked_head
from lmssl.recipe.base import Activation
from lmssl.recipe.model import FAMILIES, Gpt2Model, LlamaModel, OtherModel, Qwen3Model

LLAMA: dict[str, Any] = {
    "kind": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


TOKENS: dict[str, Any] = {"tokenizer": Tokens(), "vocab_size": VOCAB}


class FakeTokenizer:
    num_tokens, bos_id, eos_id, pad_id = 300, None, 7, 8


def config(section: Any, **change: Any) -> Any:
    return build_config(section, **{"vocab_size": 320, "sequence_length": 64, "tokenizer": FakeTokenizer(), **change})


def test_llama_takes_vocabulary_positions_and_special_ids() -> None:
    got = config(LlamaModel(**LLAMA, rope_theta=5e5))
    assert (got.vocab_size, got.max_position_embeddings, got.eos_token_id, got.pad_token_id) == (320, 64, 7, 8)
    assert got.bos_token_id is None
    assert got.rope_parameters["rope_theta"] == 5e5
    assert got.num_key_value_heads == 4
    assert got.head_dim == 8


def test_qwen3_head_dim_follows_the_width_and_not_transformers_default() -> None:
    assert config(Qwen3Model(**{**LLAMA, "kind": "qwen3"})).head_dim == 8


def test_gpt2_has_no_dropout_by_default() -> None:
    got = config(Gpt2Model(kind="gpt2", n_embd=32, n_layer=2, n_head=4))
    assert (got.resid_pdrop, got.embd_pdrop, got.attn_pdrop, got.n_positions) == (0.0, 0.0, 0.0, 64)


def test_tokenizer_larger_than_the_vocabulary() -> None:
    with pytest.raises(ModelError, match="300 tokens.*only 256"):
        config(LlamaModel(**LLAMA, vocab_size=256))


def test_sequence_longer_than_the_positions() -> None:
    with pytest.raises(ModelError, match="64 tokens do not fit the model's 32 positions"):
        config(LlamaModel(**LLAMA, max_position_embeddings=32))


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="did you mean 'mistral'"):
        config(OtherModel(**{**LLAMA, "kind": "mistrall"}))


def test_unknown_field_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="did you mean 'hidden_size'"):
        config(OtherModel(**{**LLAMA, "kind": "mistral", "hiden_size": 3}))


def test_an_activation_that_transformers_lacks_names_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"no activation 'silo'[^?]*did you mean 'silu'"):
        config(OtherModel(**{**LLAMA, "kind": "mistral", "hidden_act": "silo"}))


def test_shipped_families_take_every_activation_of_transformers() -> None:
    assert {name for part in get_args(Activation) for name in get_args(part)} == {*ACT2FN}


def test_sizes_left_out_are_refused() -> None:
    with pytest.raises(ModelError, match="needs intermediate_size"):
        config(OtherModel(**{k: v for k, v in LLAMA.items() if k != "intermediate_size"} | {"kind": "mistral"}))


def test_another_stock_family_trains_through_our_head() -> None:
    section = OtherModel(**{**LLAMA, "kind": "mistral", "sliding_window": None})
    assert type(build_model(config(section), seed=1)).__name__ == "MistralForCausalLM"


def test_a_family_that_scales_its_logits_is_refused() -> None:
    section = OtherModel(**{**LLAMA, "kind": "granite", "logits_scaling": 8.0})
    with pytest.raises(ModelError, match="otherwise"):
        build_model(config(section), seed=1)


def test_weights_depend_on_the_seed_alone() -> None:
    cfg = config(LlamaModel(**LLAMA))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(cfg, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    second, other = build_model(cfg, seed=3), build_model(cfg, seed=4)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize("kind", [*FAMILIES, "electra, replaced", "bert, sentences"])
def test_only_weights_are_missing_where_none_are_drawn(kind: str) -> None:
    """A resume loads them; buffers and what is tied are there, and the caller's random state is left alone."""
    name, _, special = kind.partition(", ")
    sizes = {**MASKED, **SPAN}.get(name, {k: v for k, v in LLAMA.items() if k != "kind"})
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if name == "gpt2" else sizes
    objective = (
        special if special == "replaced" else "span" if name in SPAN else "masked" if name in MASKED else "causal"
    )
    built = config(
        FAMILIES[name].model_validate({"kind": name, **sizes}), objective=objective, sequence_length=40, **TOKENS
    )
    settings: dict[str, Any] = {"objective": objective, "seed": 1, "sentences": special == "sentences"}
    drawn = build_model(built, **settings)
    state = torch.get_rng_state()
    empty = build_model(built, **settings, draw=False)
    assert torch.equal(torch.get_rng_state(), state)
    weights, others = dict(drawn.named_parameters()), dict(empty.named_parameters())
    assert weights.keys() == others.keys()
    assert {name: p.shape for name, p in weights.items()} == {name: p.shape for name, p in others.items()}
    assert all(p.dtype == torch.float32 for p in others.values())
    for (name, buffer), (other_name, other) in zip(drawn.named_buffers(), empty.named_buffers(), strict=True):
        assert name == other_name and torch.equal(buffer, other), name
    with torch.no_grad():
        for name, weight in others.items():
            weight.copy_(weights[name])
    shared = {name: tensor.data_ptr() for name, tensor in empty.state_dict().items()}
    for name, tensor in drawn.state_dict().items():
        assert torch.equal(tensor, empty.state_dict()[name]), name
    assert len(set(shared.values())) == len({t.data_ptr() for t in drawn.state_dict().values()})


def test_meta_models_take_no_memory() -> None:
    model = build_model(config(LlamaModel(**LLAMA)), seed=1, device="meta")
    assert all(p.is_meta for p in model.parameters())


def masked(kind: str, **change: Any) -> Any:
    section = FAMILIES[kind].model_validate({"kind": kind, **MASKED[kind]})
    return config(section, objective="masked", tokenizer=Tokens(), **change)


@pytest.mark.parametrize("kind", MASKED)
def test_no_special_id_of_a_published_vocabulary_remains(kind: str) -> None:
    got = masked(kind)
    ids = {name: value for name, value in got.to_dict().items() if name.endswith("_token_id")}
    assert ids["pad_token_id"] == 3
    assert all(value is None or value < 101 for value in ids.values()), ids
    if kind == "modernbert":
        assert (got.cls_token_id, got.sep_token_id) == (4, 5)
    if kind == "eurobert":
        assert got.mask_token_id == 6


@pytest.mark.parametrize("kind", MASKED)
def test_masked_kinds_build_their_masked_class_without_dropout(kind: str) -> None:
    model = build_model(masked(kind), objective="masked", seed=1)
    assert type(model).__name__.lower() == f"{kind}formaskedlm"
    assert all(module.p == 0.0 for module in model.modules() if isinstance(module, torch.nn.Dropout))


def test_roberta_has_a_position_more_than_the_pad_id_and_the_sequence() -> None:
    assert masked("roberta").max_position_embeddings == 64 + 3 + 1
    section = FAMILIES["roberta"].model_validate(
        {"kind": "roberta", **MASKED["roberta"], "max_position_embeddings": 64}
    )
    with pytest.raises(ModelError, match="68 tokens do not fit the model's 64 positions"):
        config(section, objective="masked", tokenizer=Tokens())


def test_roberta_without_a_pad_token_is_refused() -> None:
    tokens: Any = Tokens()
    tokens.pad_id = None
    section = FAMILIES["roberta"].model_validate({"kind": "roberta", **MASKED["roberta"]})
    with pytest.raises(ModelError, match="roberta needs a pad token"):
        config(section, objective="masked", tokenizer=tokens)


def test_modernbert_layers_and_thetas_follow_the_recipe() -> None:
    section = FAMILIES["modernbert"].model_validate({"kind": "modernbert", **MASKED["modernbert"]})
    got = config(section, objective="masked")
    assert got.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    thetas = {name: value["rope_theta"] for name, value in got.rope_parameters.items()}
    assert thetas == {"full_attention": 500.0, "sliding_attention": 10_000.0}
    assert got.sliding_window == 2


@pytest.mark.parametrize("kind", SPAN)
def test_span_kinds_build_an_encoder_with_a_decoder(kind: str) -> None:
    section = FAMILIES[kind].model_validate({"kind": kind, **SPAN[kind]})
    got = config(section, objective="span")
    assert (got.decoder_start_token_id, got.pad_token_id, got.eos_token_id) == (8, 8, 7)
    assert (got.d_kv, got.num_decoder_layers, got.dropout_rate) == (8, 2, 0.0)
    model = build_model(got, objective="span", seed=1)
    assert type(model).__name__.endswith("ForConditionalGeneration")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("kind", "objective", "what", "remedy"),
    [
        ("llama", "masked", "masked needs a bidirectional encoder, and llama is none", "or objective.kind: hybrid"),
        ("t5", "masked", "masked needs a bidirectional encoder", "or objective.kind: span"),
        ("bert", "causal", "causal needs a decoder, and bert is none", "or objective.kind: masked"),
        ("modernbert", "hybrid", "hybrid needs a decoder", "use llama, qwen3 or gpt2"),
        ("bert", "prefix", "prefix needs a decoder", "use llama"),
        ("umt5", "causal", "causal needs a decoder", "objective.kind: span"),
        ("llama", "span", "span needs an encoder with a decoder", "use t5, umt5 or mt5"),
        ("bert", "span", "span needs an encoder with a decoder", "objective.kind: masked"),
        ("bart", "span", "span needs an encoder with a decoder", "use t5"),
        ("bert", "replaced", "replaced needs a generator and a discriminator", "electra, or objective.kind: masked"),
        ("deberta-v2", "masked", "deberta-v2 cannot pack documents under its attention", "modernbert or bert"),
        ("deberta", "masked", "deberta cannot pack documents under its attention", "modernbert or bert"),
        ("mpnet", "masked", "body and head of mpnet are not known", "use one of bert"),
        ("modernbertt", "masked", "no model of kind 'modernbertt'", "did you mean 'modernbert'"),
    ],
)
def test_a_kind_for_another_objective_is_refused(kind: str, objective: str, what: str, remedy: str) -> None:
    section = OtherModel.model_validate({"kind": kind})
    with pytest.raises(ModelError) as caught:
        config(section, objective=objective)
    assert what in caught.value.what
    assert remedy in str(caught.value.remedy)


def test_special_ids_beyond_the_embedding_are_refused() -> None:
    section = FAMILIES["bert"].model_validate({"kind": "bert", **MASKED["bert"], "vocab_size": 100})
    with pytest.raises(ModelError, match="101 tokens.*only 100"):
        config(section, objective="masked", tokenizer=Tokens())


def test_kin_of_roberta_train_through_our_head() -> None:
    sizes = dict(MASKED["roberta"], hidden_act="gelu")
    section = OtherModel.model_validate({"kind": "xlm-roberta", **sizes})
    got = config(section, objective="masked", tokenizer=Tokens())
    assert type(build_model(got, objective="masked", seed=1)).__name__ == "XLMRobertaForMaskedLM"


def test_a_masked_head_that_is_not_the_models_own_is_refused() -> None:
    model = tiny("bert")
    model.cls.predictions.decoder.bias = torch.nn.Parameter(torch.zeros(101))
    model.cls.predictions.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ModelError, match="otherwise"):
        check_masked_head(model)
