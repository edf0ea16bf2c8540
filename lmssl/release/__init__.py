"""What a published model says of itself, and what it must not say."""
