"""Train, load and run tokenizers; no torch below this package."""
