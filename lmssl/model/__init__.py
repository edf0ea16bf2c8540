"""Stock transformers models: construction, document attention, the loss head, FLOPs."""
