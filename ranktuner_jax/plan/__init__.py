"""What a run needs on devices that need not be there, from the compiled step."""

from ranktuner_jax.plan.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
