"""Teach an exported causal model to answer, with TRL's SFTTrainer and a chat template.

    python recipes/finetune/instruct_with_trl.py MODEL conversations.jsonl [--out assistant]

Rows are {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}; exports come without a
chat template, so chat.jinja beside this file is used. Needs `pip install trl`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train, save, answer the first question; the last line printed is the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("conversations")
    parser.add_argument("--chat-template", type=Path, default=Path(__file__).with_name("chat.jinja"))
    parser.add_argument("--out", default="assistant")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    data = load_dataset("json", data_files=args.conversations)["train"]
    first = data[0]["messages"]
    # The last answer is what is learned: TRL counts no loss on a prompt.
    data = data.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns=["messages"]
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = args.chat_template.read_text(encoding="utf-8")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        args=SFTConfig(
            output_dir=args.out,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=16,
            learning_rate=args.lr,
            max_length=tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else 1024,
            warmup_steps=0.06,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=10,
            seed=args.seed,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    trainer.save_model(args.out)

    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out)
    inputs = tokenizer.apply_chat_template(
        first[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    names = {"input_ids", "attention_mask"}
    ids = model.generate(**{k: v for k, v in inputs.items() if k in names}, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(json.dumps({"losses": losses, "answer": answer.strip(), "model": args.out}))


if __name__ == "__main__":
    main()
