"""Text to sequences: every batch is a pure function of its positions."""
