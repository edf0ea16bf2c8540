"""An export, or the checkpoints of a run, as a repository on the Hugging Face Hub."""
