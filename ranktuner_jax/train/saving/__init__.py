"""Checkpoints and other saved state of a run, and how it is restored."""
