"""What the weights do to a data set under a model, without training."""

from ranktuner_jax.diagnostics.scoring import TokenScorer, audit_methods, method_weights

__all__ = ["TokenScorer", "audit_methods", "method_weights"]
