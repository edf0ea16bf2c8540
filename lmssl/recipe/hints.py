"""What people mean: near names, and the names other toolkits use for the same thing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple


class Foreign(NamedTuple):
    """Our answer to another toolkit's name."""

    ours: str | None
    """Dotted path of our key, if there is one."""
    say: str
    """What to do."""


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice most like `word`, or None."""
    by_fold = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), list(by_fold), n=1, cutoff=cutoff)
    return by_fold[found[0]] if found else None


def foreign(key: str) -> Foreign | None:
    """Our answer to a key of TrainingArguments, run_clm, nanoGPT and the like."""
    folded = key.lower().replace("-", "_")
    if folded in _FOREIGN:
        return _FOREIGN[folded]
    if is_secret(folded):
        return _SECRET
    for prefix, answer in _PREFIXES.items():
        if folded.startswith(prefix):
            return answer
    return None


def is_secret(key: str) -> bool:
    """Whether a key's value must never be shown."""
    words = key.lower().replace("-", "_").split("_")
    return bool({"token", "password", "secret", "passwd", "credentials"} & set(words)) or "api_key" in key.lower()


def foreign_value(path: str, value: str) -> str | None:
    """What to write for a value other toolkits use, such as `fp16`."""
    known = _VALUES.get(path) or _VALUES.get(path.rpartition(".")[2], {})
    return known.get(value.lower())


def _to(ours: str, say: str = "") -> Foreign:
    return Foreign(ours, say or f"here it is {ours}")


def _no(say: str) -> Foreign:
    return Foreign(None, say)


_SECRET = _no("a recipe is saved and shared, so it never holds a token; use `hf auth login` or the variable HF_TOKEN")
_MICRO = _to("train.micro_batch_sequences", "sequences of one forward on one device: train.micro_batch_sequences")
_TRACK = _to("track.with", "write track.with: [tensorboard], or leave it out")
_LAUNCH = _no("a recipe says what, a launch file says where; pass it to `accelerate launch --config_file`")
_UPLOAD = _no("a run is uploaded by a command of its own: `lmssl push RUN --repo ORG/NAME`")
_NATIVE = "model takes transformers' own names"

_TABLE: tuple[tuple[str, Foreign], ...] = (
    # The optimiser and its schedule.
    ("learning_rate max_lr base_lr peak_lr", _to("optim.lr", "the peak learning rate is optim.lr")),
    ("adam_beta1 adam_beta2 beta1 beta2 adam_betas", _to("optim.betas", "write optim.betas: [0.9, 0.95]")),
    ("adam_epsilon epsilon adam_eps", _to("optim.eps")),
    ("grad_clip gradient_clip_val max_norm clip_grad_norm gradient_clipping", _to("optim.max_grad_norm")),
    ("wd", _to("optim.weight_decay")),
    ("muon_lr matrix_lr", _to("optim.lr", "with optim.kind: muon, hidden matrices have optim.lr")),
    ("optimizer optimiser", _to("optim", "the section is called optim: optim: {kind: adamw, lr: 3e-4}")),
    (
        "lr_scheduler_type lr_scheduler scheduler lr_scheduler_kwargs lr_schedule",
        _to("schedule.kind", "the schedule is schedule.kind: wsd, cosine, linear, inverse_sqrt or constant"),
    ),
    (
        "warmup_steps warmup_ratio num_warmup_steps warmup_iters lr_warmup_steps warmup",
        _to(
            "schedule.warmup_tokens",
            "warmup is counted in tokens: schedule.warmup_tokens = steps x train.batch_tokens",
        ),
    ),
    ("lr_decay_iters lr_decay_steps", _to("train.tokens", "the schedule ends with the budget train.tokens")),
    (
        "min_lr min_learning_rate",
        _to("schedule.min_lr_ratio", "write schedule.min_lr_ratio: the last rate / the peak rate"),
    ),
    # Budget, batch and precision.
    (
        "max_steps num_train_epochs epochs num_epochs max_iters steps train_steps num_steps max_epochs",
        _to(
            "train.tokens", "the budget is train.tokens: steps x train.batch_tokens, or epochs x tokens of the corpora"
        ),
    ),
    ("per_device_train_batch_size per_gpu_train_batch_size micro_batch_size device_batch_size", _MICRO),
    ("per_device_eval_batch_size eval_batch_size", _MICRO),
    (
        "batch_size global_batch_size total_batch_size train_batch_size",
        _to("train.batch_tokens", "train.batch_tokens counts the tokens of one step: sequences x data.sequence_length"),
    ),
    (
        "rampup_batch_size batch_size_rampup batch_size_warmup_tokens batch_size_warmup",
        _to("train.batch_warmup", "write train.batch_warmup: {from_tokens: the first step, tokens: how long}"),
    ),
    ("ema ema_beta ema_rate use_ema", _to("train.ema_decay", "write train.ema_decay: 0.999, or null for none")),
    (
        "gradient_accumulation_steps grad_accum_steps accumulate_grad_batches",
        _no(
            "accumulation follows from train.batch_tokens, train.micro_batch_sequences and the number of devices; "
            "leave it out"
        ),
    ),
    (
        "bf16 fp16 tf32 bf16_full_eval fp16_full_eval dtype torch_dtype mixed_precision",
        _to("train.precision", "write train.precision: bf16, fp16 or fp32, or leave it out"),
    ),
    (
        "torch_compile torch_compile_backend torch_compile_mode",
        _to("train.compile", "write train.compile: auto, off, layers or model"),
    ),
    (
        "gradient_checkpointing activation_checkpointing",
        _no("there is no such option; lower train.micro_batch_sequences to save memory, the result stays the same"),
    ),
    ("full_determinism", _to("train.deterministic")),
    ("random_seed", _to("seed")),
    # Saving, evaluating, logging.
    (
        "save_steps save_strategy save_interval always_save_checkpoint checkpoint_every",
        _to("checkpoint.every_steps", "write checkpoint.every_steps: N, or null for the last step only"),
    ),
    ("save_total_limit keep_checkpoints", _to("checkpoint.keep_last")),
    (
        "load_best_model_at_end metric_for_best_model save_top_k",
        _to("checkpoint.keep_best", "write checkpoint.keep_best: N, which keeps the N of lowest validation loss"),
    ),
    ("async_save save_async async_checkpointing", _to("checkpoint.asynchronous")),
    (
        "eval_steps eval_strategy evaluation_strategy eval_interval do_eval",
        _to("evaluate.every_steps", "write evaluate.every_steps: N, or null for start and end only"),
    ),
    ("logging_steps log_interval log_every logging_strategy", _to("train.log_every_steps")),
    ("report_to wandb_log wandb_project log_with loggers", _TRACK),
    (
        "output_dir out_dir logging_dir overwrite_output_dir save_dir",
        _to("out", "the run folder is out; left out it is runs/<name>"),
    ),
    ("run_name wandb_run_name experiment_name", _to("name", "the run is named by name, at the top")),
    (
        "resume_from_checkpoint resume init_from resume_from ignore_data_skip",
        _no("leave it out: the same command continues from the newest checkpoint in the run folder"),
    ),
    ("do_train do_predict", _no("leave it out: `lmssl train` trains")),
    ("push_to_hub hub_model_id hub_strategy hub_private_repo", _UPLOAD),
    ("deepspeed fsdp fsdp_config local_rank device use_cpu", _LAUNCH),
    # Text.
    (
        "block_size max_seq_length max_length seq_len seq_length context_length model_max_length",
        _to("data.sequence_length"),
    ),
    ("data_seed", _to("data.seed", "the seed of the order is data.seed; left out it is seed")),
    (
        "train_file dataset_name dataset dataset_path train_files data_path corpus corpora",
        _to(
            "data.mixture",
            "corpora are listed in data.mixture: [{name: mine, kind: text, path: 'corpora/*.txt'}]",
        ),
    ),
    (
        "validation_file",
        _to(
            "data.validation",
            "held-out documents are chosen from the corpora themselves: data.validation: {ratio: 0.01}",
        ),
    ),
    (
        "validation_split_percentage validation_split val_split",
        _to("data.validation.ratio", "data.validation.ratio is a share, such as 0.01"),
    ),
    ("eval_iters max_eval_samples", _to("data.validation.tokens")),
    ("text_column text_column_name", _to("data.mixture.0.field", "the text column is the corpus's field")),
    (
        "streaming preprocessing_num_workers overwrite_cache",
        _no("leave it out: text is cached just ahead of the reader"),
    ),
    ("cache_dir", _to("data.cache")),
    ("dataloader_num_workers num_workers num_proc", _to("data.workers")),
    ("dataloader_drop_last dataloader_pin_memory remove_unused_columns", _no("leave it out")),
    ("shuffle_buffer shuffle_buffer_size buffer_size", _to("data.window_chunks")),
    ("add_bos_token", _to("data.bos")),
    ("add_eos_token", _to("data.eos")),
    ("group_by_length", _to("data.packing")),
    ("tokenizer_name tokenizer_path tokenizer_name_or_path", _to("tokenizer.path")),
    # The model.
    (
        "model_name_or_path model_name config_name model_type",
        _to("model.kind", "training starts from new weights; say which with model: {kind: llama, hidden_size: ...}"),
    ),
    ("config_overrides", _to("model", f"{_NATIVE}, one key each: model: {{kind: gpt2, n_embd: 256}}")),
    ("n_layers num_layers depth", _no(f"{_NATIVE}: num_hidden_layers for llama and qwen3, n_layer for gpt2")),
    ("d_model dim width n_dim model_dim", _no(f"{_NATIVE}: hidden_size for llama and qwen3, n_embd for gpt2")),
    ("n_heads num_heads", _no(f"{_NATIVE}: num_attention_heads for llama and qwen3, n_head for gpt2")),
    ("n_kv_heads num_kv_heads", _to("model.num_key_value_heads")),
    ("tie_weights tie_embeddings", _to("model.tie_word_embeddings")),
    ("dropout", _no("llama and qwen3 have model.attention_dropout; gpt2 has resid_pdrop, embd_pdrop and attn_pdrop")),
    (
        "attn_implementation use_flash_attention_2",
        _no("leave it out: the attention is chosen by device and data"),
    ),
)

_FOREIGN: dict[str, Foreign] = {name: answer for names, answer in _TABLE for name in names.split()}

_PREFIXES: dict[str, Foreign] = {
    "fsdp_": _LAUNCH,
    "ddp_": _LAUNCH,
    "deepspeed_": _LAUNCH,
    "hub_": _UPLOAD,
    "wandb_": _TRACK,
    "mlm_": _no("the masked objective has a rate of its own: objective: {kind: masked, rate: 0.15}"),
}

_VALUES: dict[str, dict[str, str]] = {
    "train.precision": {
        "fp16": "fp16",
        "float16": "fp16",
        "half": "fp16",
        "16": "fp16, or bf16 where the device has it",
        "float8": "fp8",
        "bfloat16": "bf16",
        "float32": "fp32",
        "no": "fp32",
        "32": "fp32",
    },
    "schedule.kind": {
        "warmup_stable_decay": "wsd",
        "trapezoidal": "wsd",
        "constant_with_warmup": "constant",
        "cosine_with_min_lr": "cosine with min_lr_ratio",
        "polynomial": "linear",
    },
    "optim.kind": dict.fromkeys(("adam", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_8bit"), "adamw"),
    "objective.kind": dict.fromkeys(("clm", "gpt", "next_token", "lm", "causal_lm"), "causal"),
    "data.packing": {"true": "best_fit", "bfd": "best_fit", "false": "none", "group_texts": "concat"},
    "train.compile": {
        **dict.fromkeys(("true", "yes", "on"), "auto"),
        **dict.fromkeys(("false", "no", "none", "null"), "off"),
    },
    "train.kernels": dict.fromkeys(("true", "yes"), "on") | dict.fromkeys(("false", "no", "none", "null"), "off"),
    "kind": {"txt": "text", "json": "jsonl", "hf": "datasets", "hub": "datasets"},
}
