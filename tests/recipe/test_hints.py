from __future__ import annotations

import pytest

from lmssl.recipe import hints, keys
from lmssl.recipe.hints import foreign, foreign_value, is_secret, nearest
from lmssl.recipe.sections import Recipe

# What a recipe of transformers' examples or of nanoGPT holds, and where it went.
BROUGHT = {
    "learning_rate": "optim.lr",
    "per_device_train_batch_size": "train.micro_batch_sequences",
    "max_steps": "train.tokens",
    "num_train_epochs": "train.tokens",
    "warmup_steps": "schedule.warmup_tokens",
    "warmup_ratio": "schedule.warmup_tokens",
    "lr_scheduler_type": "schedule.kind",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_compile": "train.compile",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "save_top_k": "checkpoint.keep_best",
    "async_save": "checkpoint.asynchronous",
    "eval_steps": "evaluate.every_steps",
    "logging_steps": "train.log_every_steps",
    "report_to": "track.with",
    "output_dir": "out",
    "block_size": "data.sequence_length",
    "data_seed": "data.seed",
    "adam_beta1": "optim.betas",
    "adam_epsilon": "optim.eps",
    "model_name_or_path": "model.kind",
    "tokenizer_name": "tokenizer.path",
    "train_file": "data.mixture",
    "grad_clip": "optim.max_grad_norm",
    "batch_size": "train.batch_tokens",
    "rampup_batch_size": "train.batch_warmup",
    "use_ema": "train.ema_decay",
    "n_kv_heads": "model.num_key_value_heads",
}


@pytest.mark.parametrize(("theirs", "ours"), BROUGHT.items())
def test_foreign_names_lead_to_ours(theirs: str, ours: str) -> None:
    answer = foreign(theirs)
    assert answer is not None
    assert answer.ours == ours
    assert answer.say
    assert foreign(theirs.upper().replace("_", "-")) == answer


@pytest.mark.parametrize(
    ("theirs", "say"),
    [
        ("gradient_accumulation_steps", "accumulation follows from train.batch_tokens"),
        ("gradient_checkpointing", "train.micro_batch_sequences"),
        ("resume_from_checkpoint", "the same command continues"),
        ("deepspeed", "accelerate launch"),
        ("fsdp_transformer_layer_cls_to_wrap", "accelerate launch"),
        ("push_to_hub", "lmssl push"),
        ("hub_token", "never holds a token"),
        ("d_model", "hidden_size"),
        ("mlm_probability", "objective: {kind: masked, rate: 0.15}"),
    ],
)
def test_names_without_ours_say_what_to_do(theirs: str, say: str) -> None:
    answer = foreign(theirs)
    assert answer is not None and answer.ours is None
    assert say in answer.say


def test_every_answer_names_a_key_that_exists() -> None:
    known = {".".join(path) for path in keys.leaves(None, Recipe)}
    answers = [*hints._FOREIGN.values(), *hints._PREFIXES.values()]
    assert {answer.ours for answer in answers if answer.ours} <= known


def test_no_foreign_name_is_one_of_ours_at_the_same_place() -> None:
    top = set(keys.fields(Recipe))
    assert not top & set(hints._FOREIGN)
    assert all(name == name.lower() for name in hints._FOREIGN)


def test_every_name_stands_once_in_the_table() -> None:
    names = [name for line, _ in hints._TABLE for name in line.split()]
    assert len(names) == len(set(names))


def test_ordinary_names_are_not_foreign() -> None:
    assert foreign("lr") is None
    assert foreign("tokenizer") is None
    assert foreign("batch_tokens") is None


def test_secrets_are_known_by_name() -> None:
    assert all(is_secret(name) for name in ("token", "HF_TOKEN", "wandb_api_key", "password", "auth-token"))
    assert not any(is_secret(name) for name in ("tokens", "tokenizer", "batch_tokens", "field"))


def test_foreign_values() -> None:
    assert foreign_value("schedule.kind", "warmup_stable_decay") == "wsd"
    assert foreign_value("data.mixture.3.kind", "json") == "jsonl"
    assert foreign_value("train.precision", "FP16") == "fp16"
    assert foreign_value("optim.lr", "fp16") is None


def test_nearest() -> None:
    assert nearest("Weight-Decay", ["lr", "weight_decay"]) == "weight_decay"
    assert nearest("xyz", ["lr", "weight_decay"]) is None
