"""Table 1 of the paper: how much noise is among the tokens that a score puts in its top 10 %."""

from ranktuner_jax.diagnostics.noise.inject import KINDS, Polluted, pollute
from ranktuner_jax.diagnostics.noise.result import PAPER, Result, Table, compare, title
from ranktuner_jax.diagnostics.noise.run import Plan, run_noise
from ranktuner_jax.diagnostics.noise.sequences import Sequences, read_sequences, score_sequences
from ranktuner_jax.diagnostics.noise.table import MEASURES, Draw, Measure, measure

__all__ = [
    "KINDS",
    "MEASURES",
    "PAPER",
    "Draw",
    "Measure",
    "Plan",
    "Polluted",
    "Result",
    "Sequences",
    "Table",
    "compare",
    "measure",
    "pollute",
    "read_sequences",
    "run_noise",
    "score_sequences",
    "title",
]
