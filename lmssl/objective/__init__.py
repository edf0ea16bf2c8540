"""Objectives: from sequences to inputs, targets, summed losses and target counts."""
