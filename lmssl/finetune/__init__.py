"""Fine-tuning with transformers' own Trainer: what a pretrained model is worth on labelled data."""
