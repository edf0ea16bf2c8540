"""Fine-tune an export for classification by LoRA: small matrices are learned, the export stays as it is.

    python recipes/finetune/adapt_with_peft.py MODEL train.jsonl test.jsonl [--out adapter]

Rows are {"text": ..., "label": ...}. Needs `pip install peft`.
Source: Hu et al. 2021; all linear layers are adapted, as Dettmers et al. 2023 advise.
"""

from __future__ import annotations

import argparse
import json

import torch
from datasets import load_dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)


def main() -> None:
    """Train, save the adapter, load it again and score it; the last line printed is the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--out", default="adapter")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)  # LoRA wants about ten times the rate of full fine-tuning
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    data = load_dataset("json", data_files={"train": args.train, "test": args.test})
    labels = sorted({str(label) for label in data["train"]["label"]})
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    end = tokenizer.eos_token if tokenizer.num_special_tokens_to_add() == 0 else ""

    def encode(rows: dict[str, list[str]]) -> dict[str, list[object]]:
        encoded = tokenizer([text + end for text in rows["text"]], truncation=True)
        return {**encoded, "labels": [labels.index(str(label)) for label in rows["label"]]}

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
    set_seed(args.seed)
    settings = {"num_labels": len(labels), "pad_token_id": tokenizer.pad_token_id}
    base = AutoModelForSequenceClassification.from_pretrained(args.model, **settings)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    model = get_peft_model(base, lora)
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=32,
            learning_rate=args.lr,
            warmup_steps=0.06,
            seed=args.seed,
            save_strategy="no",
            report_to="none",
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=data["train"],
        processing_class=tokenizer,
    )
    trainer.train()
    model.save_pretrained(args.out)

    loaded = AutoPeftModelForSequenceClassification.from_pretrained(args.out, **settings).eval()
    right = 0
    with torch.no_grad():
        for row in data["test"]:
            inputs = {name: torch.tensor([row[name]]) for name in tokenizer.model_input_names if name in row}
            right += int(loaded(**inputs).logits.argmax()) == row["labels"]
    print(json.dumps({"accuracy": right / len(data["test"]), "adapter": args.out}))


if __name__ == "__main__":
    main()
