"""The whole trainer against a loop anybody can check: stock model, one document at a time, plain AdamW."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmssl import checkpoint
from lmssl.data.stream import SequenceStream
from lmssl.model.build import build_config
from lmssl.recipe.load import load_recipe
from lmssl.recipe.sections import Recipe
from lmssl.shipped import find
from lmssl.tokenizer.load import load_tokenizer
from lmssl.train.run import train
from runs import metrics, small_recipe, write_recipe

STEPS = 10


def reference(recipe: Recipe, cache: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights, by the slow and obvious way."""
    tokenizer = load_tokenizer(find(recipe.tokenizer.path))
    stream = SequenceStream.open(recipe.data, tokenizer, seed=recipe.data_seed, cache_dir=cache)
    config = build_config(recipe.model, vocab_size=4096, sequence_length=64, tokenizer=tokenizer)
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    losses = []
    for step in range(STEPS):
        documents = []
        for position in range(step * 16, step * 16 + 16):
            row = stream.sequence(position)
            for segment in range(1, int(row.segments_T.max()) + 1):
                documents.append(torch.from_numpy(row.ids_T[row.segments_T == segment])[None])
        num_targets = sum(d.shape[1] - 1 for d in documents)
        total = 0.0
        for document in documents:
            if document.shape[1] > 1:
                nats = model(input_ids=document, labels=document, use_cache=False).loss * (document.shape[1] - 1)
                (nats / num_targets).backward()
                total += float(nats.detach())
        losses.append(total / num_targets)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        tokens = step * 1024
        warmup, decay = tokens / 2048, (STEPS * 1024 - tokens) / (0.3 * STEPS * 1024)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (max(1e-3, warmup) if tokens < 2048 else min(1.0, decay))
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def test_ten_steps_equal_the_obvious_loop(tmp_path: Path, text_folder: Path) -> None:
    change = {"train.precision": "fp32", "train.micro_batch_sequences": 3}
    recipe = small_recipe(text_folder, tmp_path / "run", tmp_path / "cache", steps=STEPS, **change)
    loaded = load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe))
    run = train(loaded)
    losses, weights = reference(loaded.recipe, tmp_path / "cache")
    ours = [r["loss"] for r in metrics(run) if r["kind"] == "train"]
    assert ours == pytest.approx(losses, rel=1e-5)
    found = checkpoint.find_step(run, None).tensors("model")
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3)
