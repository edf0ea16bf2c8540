from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from kinds import MASKED, PAD, SPAN, Tokens, with_attention
from lmssl.errors import ModelError
from lmssl.model.build import build_config, build_model
from lmssl.model.electra import ElectraPair
from lmssl.model.encoder import encode, masked_head
from lmssl.model.flops import (
    flops_per_token,
    has_formula,
    num_parameters,
    trained_flops_per_token,
    trained_parameters,
    training_memory,
)
from lmssl.model.roles import Count, role_counts
from lmssl.optim.groups import parameter_roles
from lmssl.recipe.family import ModelBase
from lmssl.recipe.model import FAMILIES, OtherModel
from lmssl.recipe.objective import AnyObjective, CausalObjective, MaskedObjective, ReplacedObjective
from lmssl.recipe.optim import ROLES

VOCAB, LENGTH = 1024, 256
ROTARY = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 6}
GPT2 = {"n_embd": 96, "n_layer": 2, "n_head": 4}
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", ROTARY),
    ("llama", {**ROTARY, "num_key_value_heads": 2}),
    ("llama", {**ROTARY, "head_dim": 48, "tie_word_embeddings": False}),
    ("llama", {**ROTARY, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 3}),
    ("qwen3", ROTARY),
    ("qwen3", {**ROTARY, "head_dim": 64, "num_key_value_heads": 2}),
    ("qwen3", {**ROTARY, "attention_bias": True, "tie_word_embeddings": False, "head_dim": 16}),
    ("gpt2", GPT2),
    ("gpt2", {**GPT2, "n_inner": 100, "n_positions": 512}),
    ("gpt2", {**GPT2, "tie_word_embeddings": False}),
]


def section(kind: str, sizes: dict[str, Any]) -> ModelBase:
    return FAMILIES[kind].model_validate({"kind": kind, **sizes})


def built(model: ModelBase) -> PreTrainedModel:
    config = build_config(model, vocab_size=VOCAB, sequence_length=LENGTH, tokenizer=None)
    return build_model(config, seed=0, device="meta")


@pytest.mark.parametrize(("kind", "sizes"), SHAPES)
def test_parameters_are_those_of_the_built_model(kind: str, sizes: dict[str, Any]) -> None:
    model = section(kind, sizes)
    stock = built(model)
    counted = num_parameters(model, vocab_size=VOCAB, sequence_length=LENGTH)
    assert counted.total == sum(p.numel() for p in stock.parameters())
    head = stock.get_output_embeddings().weight
    assert counted.head == (0 if model.tie_word_embeddings else head.numel())
    body = {name: p for name, p in stock.base_model.named_parameters() if not name.startswith(("embed_", "wte", "wpe"))}
    assert counted.body == sum(p.numel() for p in body.values())


@pytest.mark.parametrize(("kind", "sizes"), SHAPES)
def test_flops_are_six_per_weight_of_a_product_and_token(kind: str, sizes: dict[str, Any]) -> None:
    model = section(kind, sizes)
    stock = built(model)
    config = stock.config
    layers = [p for name, p in stock.named_parameters() if p.ndim == 2 and ("layers." in name or ".h." in name)]
    products = sum(p.numel() for p in layers) + VOCAB * config.hidden_size
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim * LENGTH
    assert flops_per_token(model, vocab_size=VOCAB, sequence_length=LENGTH) == 6 * products + 6 * attention


def test_flops_agree_with_a_counted_forward_pass() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = section("llama", {**ROTARY, "num_key_value_heads": 2})
    config = build_config(model, vocab_size=VOCAB, sequence_length=LENGTH, tokenizer=None)
    stock = build_model(config, seed=0)
    stock.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stock(input_ids=torch.zeros(1, LENGTH, dtype=torch.long), use_cache=False)
    ours = flops_per_token(model, vocab_size=VOCAB, sequence_length=LENGTH) * LENGTH / 3
    pairs = 2 * ROTARY["num_hidden_layers"] * ROTARY["hidden_size"] * LENGTH * LENGTH  # the half that is masked
    # The rotary angles are a product of positions and frequencies, too small to belong in a formula.
    assert counter.get_total_flops() == pytest.approx(ours + pairs, rel=1e-3)


def test_memory_is_sixteen_bytes_a_parameter() -> None:
    memory = training_memory(1000)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.total) == (4000, 4000, 8000, 16000)


def test_other_families_have_no_formula() -> None:
    other = OtherModel.model_validate({"kind": "olmo2", "hidden_size": 64})
    assert not has_formula(other)
    assert has_formula(section("gpt2", GPT2))
    with pytest.raises(ModelError, match="no formula for the size of kind olmo2") as caught:
        num_parameters(other, vocab_size=VOCAB, sequence_length=LENGTH)
    assert caught.value.remedy is not None


WINDOWED = {**MASKED["modernbert"], "num_hidden_layers": 5, "local_attention": 9}
BIDIRECTIONAL: list[tuple[str, dict[str, Any]]] = [
    *MASKED.items(),
    *SPAN.items(),
    ("bert", {**MASKED["bert"], "max_position_embeddings": 300, "type_vocab_size": 1}),
    ("roberta", {**MASKED["roberta"], "max_position_embeddings": 300}),
    ("electra", {**MASKED["electra"], "tie_word_embeddings": False}),
    ("electra", {**MASKED["electra"], "embedding_size": 32}),
    ("modernbert", WINDOWED),
    ("modernbert", {**WINDOWED, "norm_bias": True, "classifier_bias": True, "decoder_bias": False}),
    ("modernbert", {**WINDOWED, "mlp_bias": True, "attention_bias": True, "tie_word_embeddings": False}),
    ("eurobert", {**MASKED["eurobert"], "mlp_bias": True, "attention_bias": True, "head_dim": 6}),
    ("distilbert", {**MASKED["distilbert"], "tie_word_embeddings": False, "max_position_embeddings": 300}),
    ("t5", {**SPAN["t5"], "feed_forward_proj": "relu", "num_decoder_layers": 3, "d_kv": 6}),
    ("umt5", {**SPAN["umt5"], "num_decoder_layers": 1, "relative_attention_num_buckets": 8}),
]


def two_way(kind: str, sizes: dict[str, Any], device: str = "meta") -> PreTrainedModel:
    objective, tokenizer = "span" if kind in SPAN else "masked", cast(Any, Tokens())
    model = section(kind, sizes)
    config = build_config(model, objective=objective, vocab_size=VOCAB, sequence_length=LENGTH, tokenizer=tokenizer)
    return build_model(config, objective=objective, seed=0, device=device)


@pytest.mark.parametrize(("kind", "sizes"), BIDIRECTIONAL)
def test_parameters_of_encoders_are_those_of_the_built_model(kind: str, sizes: dict[str, Any]) -> None:
    stock = two_way(kind, sizes)
    counted = num_parameters(section(kind, sizes), vocab_size=VOCAB, sequence_length=LENGTH, pad_id=PAD)
    assert counted.total == sum(p.numel() for p in stock.parameters())
    head = stock.get_output_embeddings().weight
    assert counted.head == (0 if sizes.get("tie_word_embeddings", True) else head.numel())
    names = ("word_embeddings", "position_embeddings", "token_type", "tok_embeddings", "embed_tokens", "shared")
    rows = {name: p for name, p in stock.named_parameters() if any(part in name for part in names)}
    assert counted.embedding == sum(p.numel() for p in rows.values())


@pytest.mark.parametrize("kind", [*MASKED, *SPAN])
def test_flops_of_encoders_agree_with_a_counted_forward_pass(kind: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {**MASKED, **SPAN}[kind]
    stock = with_attention(two_way(kind, sizes, "cpu"), "eager")
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stock(input_ids=ids, **({"decoder_input_ids": ids, "use_cache": False} if kind in SPAN else {}))
    model = section(kind, {**sizes, "local_attention": 2 * LENGTH} if kind == "modernbert" else sizes)
    ours = flops_per_token(model, vocab_size=VOCAB, sequence_length=LENGTH) * LENGTH / 3
    if kind in SPAN:
        ours += 2 * 2 * 32 * LENGTH * LENGTH  # pairs that the decoder's mask forbids
    # Eager attention multiplies what local layers mask, too; rotary angles are products too small for a formula.
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-3)


def test_the_head_counts_at_targets_only() -> None:
    model = section("bert", MASKED["bert"])
    every, some = (
        flops_per_token(model, vocab_size=VOCAB, sequence_length=LENGTH, target_ratio=ratio) for ratio in (1.0, 0.25)
    )
    assert every - some == 6 * 0.75 * (32 * 32 + VOCAB * 32)


@pytest.mark.parametrize("kind", [*MASKED])
def test_flops_of_masked_training_are_those_of_a_counted_step(kind: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    sizes = MASKED[kind] | ({"local_attention": 2 * LENGTH} if kind == "modernbert" else {})
    stock = with_attention(two_way(kind, sizes, "cpu"), "eager")
    ids, places = torch.full((1, LENGTH), 9), torch.arange(LENGTH // 4)[None]
    head = masked_head(stock)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = encode(stock, ids, torch.ones_like(ids), torch.arange(LENGTH)[None], places_BC=places)
        head.transform(hidden.flatten(0, 1)) @ head.weight_VD.t()
    ours = trained_flops_per_token(
        *(section(kind, sizes), MaskedObjective(kind="masked")),
        vocab_size=VOCAB,
        sequence_length=LENGTH,
        target_ratio=0.25,
    )
    assert counter.get_total_flops() == pytest.approx(ours * LENGTH / 3, rel=2e-3)


def test_local_layers_meet_their_neighbourhood_only() -> None:
    near, far = (section("modernbert", {**WINDOWED, "local_attention": n}) for n in (9, 2 * LENGTH))
    more, less = (flops_per_token(model, vocab_size=VOCAB, sequence_length=LENGTH) for model in (far, near))
    assert more - less == 12 * 32 * 2 * (LENGTH - 9)


PAIRS: list[tuple[dict[str, Any], float]] = [
    (MASKED["electra"], 0.5),
    ({**MASKED["electra"], "embedding_size": 32, "max_position_embeddings": 300}, 0.25),
    ({**MASKED["electra"], "tie_word_embeddings": False, "type_vocab_size": 1}, 1.0),
]


def pair_of(sizes: dict[str, Any], ratio: float, device: str = "meta") -> ElectraPair:
    config = build_config(
        section("electra", sizes), objective="replaced", vocab_size=VOCAB, sequence_length=LENGTH, tokenizer=None
    )
    found = build_model(config, objective="replaced", seed=0, device=device, generator_ratio=ratio)
    assert isinstance(found, ElectraPair)
    return found


@pytest.mark.parametrize(("sizes", "ratio"), PAIRS)
def test_parameters_of_a_pair_are_those_of_the_built_one(sizes: dict[str, Any], ratio: float) -> None:
    stock = pair_of(sizes, ratio)
    objective = ReplacedObjective(kind="replaced", generator_ratio=ratio)
    counted = trained_parameters(section("electra", sizes), objective, vocab_size=VOCAB, sequence_length=LENGTH)
    assert counted.total == sum(p.numel() for p in stock.parameters())
    tables = stock.discriminator.electra.embeddings.named_parameters()
    assert counted.embedding == sum(p.numel() for name, p in tables if "LayerNorm" not in name)
    assert counted.head == (0 if sizes.get("tie_word_embeddings", True) else VOCAB * sizes["embedding_size"])


def test_flops_of_a_pair_agree_with_counted_forward_passes() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    stock, ids = pair_of(MASKED["electra"], 0.5, "cpu"), torch.zeros(1, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for part in (stock.discriminator, stock.generator):
            with_attention(part, "eager")(input_ids=ids)
    model, objective = section("electra", MASKED["electra"]), ReplacedObjective(kind="replaced", generator_ratio=0.5)
    every, some = (
        trained_flops_per_token(model, objective, vocab_size=VOCAB, sequence_length=LENGTH, target_ratio=ratio)
        for ratio in (1.0, 0.25)
    )
    assert counter.get_total_flops() == pytest.approx(every * LENGTH / 3, rel=1e-3)
    last = 16 * 16 + 2 * 16 * 24  # of the generator, which is half as wide
    assert every - some == 6 * 0.75 * (16 * 16 + VOCAB * 16 + last)


def test_a_head_for_pairs_of_sentences_is_counted() -> None:
    model = section("bert", MASKED["bert"])
    config = build_config(model, objective="masked", vocab_size=VOCAB, sequence_length=LENGTH, tokenizer=None)
    stock = build_model(config, objective="masked", seed=0, device="meta", sentences=True)
    objective = MaskedObjective(kind="masked", sentence_task="next")
    counted = trained_parameters(model, objective, vocab_size=VOCAB, sequence_length=LENGTH)
    assert counted.total == sum(p.numel() for p in stock.parameters())
    sizes = {"vocab_size": VOCAB, "sequence_length": LENGTH}
    assert trained_flops_per_token(model, objective, **sizes) == flops_per_token(model, **sizes)


def check_roles(stock: PreTrainedModel, model: ModelBase, objective: AnyObjective) -> None:
    """The formulas against the roles of the built model's parameters."""
    found = {role: [n for n, r in parameter_roles(stock).items() if r == role] for role in ROLES}
    expected = {
        role: Count(len(names), sum(stock.get_parameter(name).numel() for name in names))
        for role, names in found.items()
    }
    assert role_counts(model, objective, vocab_size=VOCAB, sequence_length=LENGTH, pad_id=PAD) == expected


@pytest.mark.parametrize(("kind", "sizes"), SHAPES)
def test_roles_are_those_of_the_built_model(kind: str, sizes: dict[str, Any]) -> None:
    model = section(kind, sizes)
    check_roles(built(model), model, CausalObjective(kind="causal"))


@pytest.mark.parametrize(("kind", "sizes"), BIDIRECTIONAL)
def test_roles_of_encoders_are_those_of_the_built_model(kind: str, sizes: dict[str, Any]) -> None:
    check_roles(two_way(kind, sizes), section(kind, sizes), MaskedObjective(kind="masked"))


@pytest.mark.parametrize(("sizes", "ratio"), PAIRS)
def test_roles_of_a_pair_are_those_of_the_built_one(sizes: dict[str, Any], ratio: float) -> None:
    objective = ReplacedObjective(kind="replaced", generator_ratio=ratio)
    check_roles(pair_of(sizes, ratio), section("electra", sizes), objective)


def test_the_second_task_of_bert_has_a_head() -> None:
    model, objective = section("bert", MASKED["bert"]), MaskedObjective(kind="masked", sentence_task="next")
    tokenizer = cast(Any, Tokens())
    config = build_config(model, objective="masked", vocab_size=VOCAB, sequence_length=LENGTH, tokenizer=tokenizer)
    check_roles(build_model(config, objective="masked", seed=0, device="meta", sentences=True), model, objective)


def test_roles_of_other_families_are_not_known() -> None:
    other = OtherModel.model_validate({"kind": "mamba"})
    with pytest.raises(ModelError, match="there is no formula for the weights of kind mamba"):
        role_counts(other, CausalObjective(kind="causal"), vocab_size=VOCAB, sequence_length=LENGTH)
