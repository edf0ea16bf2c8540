"""The training loop, read top to bottom: run -> session -> step."""
