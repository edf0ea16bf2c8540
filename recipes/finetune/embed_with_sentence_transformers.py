"""Make sentence embeddings from an exported encoder, with sentence-transformers.

    python recipes/finetune/embed_with_sentence_transformers.py MODEL pairs.jsonl [--out embedder]

Rows are {"anchor": ..., "positive": ...}: two texts that belong together, such as a title and its text. The other
texts of a batch serve as what does not (Henderson et al. 2017). Every tenth pair is held out. Needs
`pip install sentence-transformers`.
"""

from __future__ import annotations

import argparse
import json

import torch
from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss


def first_hits(model: SentenceTransformer, anchors: list[str], positives: list[str]) -> float:
    """Share of anchors whose nearest positive is their own."""
    options = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
    nearest = (model.encode(anchors, **options) @ model.encode(positives, **options).T).argmax(dim=1)
    return float((nearest.cpu() == torch.arange(len(anchors))).float().mean())


def main() -> None:
    """Score, train, score again, save; the last line printed is the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("--out", default="embedder")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    data = load_dataset("json", data_files=args.pairs)["train"].select_columns(["anchor", "positive"])
    held_out = data.select(range(0, len(data), 10))
    train = data.select([index for index in range(len(data)) if index % 10])
    words = modules.Transformer(args.model)
    model = SentenceTransformer(modules=[words, modules.Pooling(words.get_embedding_dimension(), pooling_mode="mean")])
    before = first_hits(model, held_out["anchor"], held_out["positive"])
    SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=args.out,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=32,
            learning_rate=args.lr,
            warmup_steps=0.06,
            seed=args.seed,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train,
        loss=MultipleNegativesRankingLoss(model),
    ).train()
    model.save_pretrained(args.out)
    after = first_hits(SentenceTransformer(args.out), held_out["anchor"], held_out["positive"])
    print(json.dumps({"before": before, "after": after, "model": args.out}))


if __name__ == "__main__":
    main()
