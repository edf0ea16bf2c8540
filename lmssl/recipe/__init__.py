"""Recipes: YAML and overrides to frozen, strict models; imports no torch."""
