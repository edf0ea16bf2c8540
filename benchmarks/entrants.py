"""Who trains in bench_train.py: lmssl and its peers, on the same model shape, text, tokenizer, batch and threads."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import peers_python
from record import HERE, last_json, run
from transformers import BertConfig, LlamaConfig

from lmssl.data.corpus import read_texts
from lmssl.recipe.data import PythonDocsCorpus
from lmssl.shipped import find

OURS = "lmssl"
UNCOMPILED = "lmssl, not compiled"
"""What short runs are: kernels of our own where the processor can, and no wait for a compiler."""
BASELINE = "Trainer, defaults: fp32, eager"
TOKENIZERS = {"causal": "tokenizer/bpe-16k", "masked": "tokenizer/wordpiece-30k"}


@dataclass(frozen=True)
class Peer:
    """A script of `peers/`, run in the peers' environment."""

    script: str
    flags: tuple[str, ...] = ()
    masked: bool = False
    """Whether it can train masked models, too; it then takes the objective first."""


PEERS = {
    BASELINE: Peer("trainer.py", masked=True),
    "Trainer: bf16, compiled": Peer("trainer.py", ("--bf16", "--compile", "--best"), masked=True),
    "Trainer: fp32, compiled": Peer("trainer.py", ("--compile", "--best"), masked=True),
    "nanoGPT loop, documented for CPU: fp32, eager": Peer("nanogpt.py"),
    "nanoGPT loop: bf16, compiled, fused": Peer("nanogpt.py", ("--dtype", "bfloat16", "--compile", "--fused")),
    "nanoGPT loop: fp32, compiled, fused": Peer("nanogpt.py", ("--compile", "--fused")),
    "litgpt, defaults: bf16, compiled": Peer("litgpt_pretrain.py"),
    "litgpt: fp32, compiled": Peer("litgpt_pretrain.py", ("--precision", "32-true")),
}
"""As documented, and compiled in either precision: which of the two is the best depends on the processor."""


def peers_of(objective: str) -> dict[str, Peer]:
    """Those that can train it."""
    return {name: peer for name, peer in PEERS.items() if peer.masked or objective == "causal"}


def causal_model(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A llama of 17 million parameters, as a config file for the peers and a model section for us."""
    width = 64 if args.tiny else 384
    section: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": width * 8 // 3 // 64 * 64 or 64,
        "num_hidden_layers": 2 if args.tiny else 6,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "tie_word_embeddings": True,
        "vocab_size": 16384,
    }
    LlamaConfig(**section, max_position_embeddings=args.length).save_pretrained(folder)
    return {"kind": "llama", **section}


def masked_model(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """BERT mini or small (Turc et al. 2019) without dropout, with a vocabulary of 30,528."""
    width = {"tiny": 128, "mini": 256, "small": 512}["tiny" if args.tiny else args.size]
    section: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2 if args.tiny else 4,
        "num_attention_heads": width // 64,
        "vocab_size": 30528,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    BertConfig(**section, max_position_embeddings=args.length).save_pretrained(folder)
    return {"kind": "bert", **section}


MODELS = {"causal": causal_model, "masked": masked_model}


def prepare(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The shared inputs: text, tokenizer, model config; returns the model section of our recipe."""
    tokenizer, model = find(Path(TOKENIZERS[args.objective])), folder / "model"
    section = MODELS[args.objective](model, args)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(tokenizer / name, model / name)
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for text in read_texts([PythonDocsCorpus(name="python_docs", kind="python_docs")]):
            file.write(json.dumps({"text": text}) + "\n")
    return section


def recipe_of(folder: Path, section: dict[str, Any], args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Our recipe with the peers' batch and optimiser; what masks there are is run_mlm's."""
    tokens = args.rows * args.length
    rates = {"rate": args.rate, "evaluation_rate": args.rate} if args.objective == "masked" else {}
    return {
        "name": "bench",
        "out": str(folder / f"run-{name}"),
        "tokenizer": {"path": str(folder / "model")},
        "data": {
            "sequence_length": args.length,
            "mixture": [{"name": "text", "kind": "jsonl", "path": str(folder / "text.jsonl")}],
            "validation": None,
            "cache": str(folder / f"cache-{name}"),
        },
        "objective": {"kind": args.objective, **rates},
        "model": section,
        "optim": {"kind": "adamw", "lr": 5e-5},
        "schedule": {"kind": "linear"},
        "train": {
            "tokens": tokens * args.steps,
            "batch_tokens": tokens,
            "micro_batch_sequences": args.rows,
            "log_every_steps": 1,
            "compile": "model",
        },
        "checkpoint": {"every_steps": None},
    }


def ours(
    folder: Path, section: dict[str, Any], args: argparse.Namespace, number: int, *, compiled: bool = True
) -> dict[str, Any]:
    """One lmssl run; step times come from its metrics."""
    name = f"{number}{'' if compiled else '-plain'}"
    path, recipe = folder / f"recipe-{name}.yaml", recipe_of(folder, section, args, name)
    if not compiled:
        recipe["train"] |= {"compile": "off", "kernels": "on"}
    path.write_text(json.dumps(recipe), encoding="utf-8")
    run([sys.executable, "-m", "lmssl", "prepare", str(path)])  # the peers tokenize before their first step, too
    run([sys.executable, "-m", "lmssl", "train", str(path)])
    rows = train_rows(folder / f"run-{name}")
    about = json.loads((folder / f"run-{name}/sessions.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    seconds = [row["time"]["seconds"] for row in rows]
    waits = [row["time"]["data_wait_ratio"] for row in rows[args.warmup :]]
    told = {"loss": rows[-1]["loss"], "threads": about["threads"], "precision": about["precision"]}
    return {"step_seconds": seconds, "data_wait_ratio": statistics.median(waits), **told}


def train_rows(folder: Path) -> list[dict[str, Any]]:
    """A run's lines of training."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


def theirs(folder: Path, peer: Peer, args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """One run of a peer; what it prints."""
    command = [str(peers_python("train")), str(HERE / "peers" / peer.script)]
    command += [args.objective] if peer.masked else []
    command += [str(folder / "model"), str(folder / "text.jsonl")]
    command += ["--sequence-length", str(args.length), "--rows", str(args.rows), "--steps", str(args.steps)]
    command += ["--rate", str(args.rate)] if args.objective == "masked" else []
    return last_json(run([*command, *peer.flags, *more]))
