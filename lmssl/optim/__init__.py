"""Optimiser groups and learning-rate schedules."""
