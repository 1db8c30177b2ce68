"""The model families, one file each."""

from ranktuner_jax.models.families.family import Family
from ranktuner_jax.models.families.registry import FAMILIES, find_family, turn_ends

__all__ = ["FAMILIES", "Family", "find_family", "turn_ends"]
