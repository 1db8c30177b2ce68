"""RankTuner for JAX: fine-tuning losses that weight each token by its relative rank."""

__version__ = "0.3.0"
