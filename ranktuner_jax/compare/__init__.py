"""Comparisons: many runs side by side, and what the differences are worth."""
