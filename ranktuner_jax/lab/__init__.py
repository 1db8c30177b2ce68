"""A laboratory: small models, and tasks with known faults, on which methods compare in minutes."""

from ranktuner_jax.lab.settings import LabSettings
from ranktuner_jax.lab.write import write_lab

__all__ = ["LabSettings", "write_lab"]
