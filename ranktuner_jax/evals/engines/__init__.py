"""Engines: what writes answers to the questions of a benchmark."""

from ranktuner_jax.evals.engines.engine import Answer, Choice, Engine, Request, Sampling
from ranktuner_jax.evals.engines.local import LocalEngine
from ranktuner_jax.evals.engines.openai import OpenAIEngine

__all__ = ["Answer", "Choice", "Engine", "LocalEngine", "OpenAIEngine", "Request", "Sampling"]
