"""Fine-tune an export for classification with plain transformers, as any model of the Hub.

    python recipes/finetune/classify_with_trainer.py MODEL train.jsonl test.jsonl [--out classifier]

Rows are {"text": ..., "label": ...}. `lmssl finetune` does this with several seeds and rates; here every line is yours.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Share of rows whose highest output is their label."""
    outputs = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    return {"accuracy": float((np.argmax(outputs, axis=-1) == found.label_ids).mean())}


def main() -> None:
    """Train, evaluate, save; the last line printed is the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--out", default="classifier")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    data = load_dataset("json", data_files={"train": args.train, "test": args.test})
    labels = sorted({str(label) for label in data["train"]["label"]})
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # A causal model is asked at the last token; the end-of-text token is the one that has seen everything.
    end = tokenizer.eos_token if tokenizer.num_special_tokens_to_add() == 0 else ""

    def encode(rows: dict[str, list[str]]) -> dict[str, list[object]]:
        encoded = tokenizer([text + end for text in rows["text"]], truncation=True)
        return {**encoded, "labels": [labels.index(str(label)) for label in rows["label"]]}

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)

    def new_model() -> AutoModelForSequenceClassification:  # the Trainer calls it when its seed is set
        return AutoModelForSequenceClassification.from_pretrained(
            args.model,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            pad_token_id=tokenizer.pad_token_id,
        )

    trainer = Trainer(
        model_init=new_model,
        args=TrainingArguments(
            output_dir=args.out,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=32,
            learning_rate=args.lr,
            warmup_steps=0.06,
            weight_decay=0.1,
            seed=args.seed,
            save_strategy="no",
            report_to="none",
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    scores = trainer.evaluate()
    trainer.save_model(args.out)
    print(json.dumps({"accuracy": scores["eval_accuracy"], "model": args.out}))


if __name__ == "__main__":
    main()
