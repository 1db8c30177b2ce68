"""The optimizers of configs: those of optax, with weight decay on matrices only.

A config file may register more: functions of the config and the schedule, whose keyword-only
parameters (each with a default) are the options.

Example:
  >>> from ranktuner_jax import train
  >>> train.OPTIMIZERS["sgd"] = lambda config, schedule, *, momentum=0.0: optax.sgd(
  ...     schedule, momentum)
  >>> train.OptimizerConfig(name="sgd", options={"momentum": 0.9}).name
  'sgd'
  >>> del train.OPTIMIZERS["sgd"]
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import optax
import optax.contrib

from ranktuner_jax.errors import UserError
from ranktuner_jax.models.partition import ADAPTER_AXES, OUTPUTS, PARAM_AXES
from ranktuner_jax.train.config.checks import suggestion
from ranktuner_jax.train.step.schedules import make_schedule

if TYPE_CHECKING:
    from ranktuner_jax.train.config import OptimizerConfig

__all__ = ["OPTIMIZERS", "make_optimizer", "optimizer_options"]


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer with its schedule; gradients are clipped by the train step, not here.

    Args:
      config: The optimizer, its schedule and its options.
      steps: Optimizer steps of the whole run, for the schedule.

    Returns:
      The optimizer.

    Raises:
      UserError: If an option is unknown to the optimizer.

    Example:
      >>> from ranktuner_jax.train import OptimizerConfig
      >>> tx = make_optimizer(OptimizerConfig(name="lion", learning_rate=1.0, warmup_ratio=0.0), 10)
      >>> params = {"bias": jax.numpy.ones(2)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["bias"]
      Array([-1., -1.], dtype=float32)
    """
    known = list(optimizer_options(config.name))
    for name in config.options:
        if name not in known:
            raise UserError(
                f"optimizer.options: {config.name} takes {', '.join(known) or 'no options'}, "
                f"got {name!r}{suggestion(name, known)}"
            )
    return OPTIMIZERS[config.name](config, make_schedule(config, steps), **config.options)


def optimizer_options(name: str) -> dict[str, Any]:
    """The options of an optimizer and their defaults: the keyword-only parameters of its function.

    Example:
      >>> optimizer_options("adamw")
      {'eps': 1e-08, 'nesterov': False}
    """
    parameters = inspect.signature(OPTIMIZERS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _adamw(
    config: OptimizerConfig, schedule: optax.Schedule, *, eps: float = 1e-8, nesterov: bool = False
) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=eps,
        mu_dtype=config.moment_dtype or None,
        weight_decay=config.weight_decay,
        mask=_decayed,
        nesterov=nesterov,
    )


def _lion(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(
        schedule,
        b1=config.b1,
        b2=config.b2,
        mu_dtype=config.moment_dtype or None,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )


def _adafactor(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    *,
    min_dim_size_to_factor: int = 128,
    decay_rate: float = 0.8,
    clipping_threshold: float = 1.0,
    multiply_by_parameter_scale: bool = False,
    momentum: float = 0.0,
) -> optax.GradientTransformation:
    if config.moment_dtype and not momentum:
        raise UserError(
            "optimizer.moment_dtype: adafactor has a first moment only with "
            f"optimizer.options.momentum, got {config.moment_dtype!r}; set both or neither"
        )
    return optax.adafactor(
        schedule,
        min_dim_size_to_factor=min_dim_size_to_factor,
        decay_rate=decay_rate,
        clipping_threshold=clipping_threshold or None,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        momentum=momentum or None,
        dtype_momentum=config.moment_dtype or None,
        # optax adds the decay after scaling by the learning rate; AdamW's decay is scaled too.
        weight_decay_rate=lambda step: config.weight_decay * schedule(step),
        weight_decay_mask=_decayed,
    )


def _muon(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    *,
    beta: float = 0.95,
    ns_steps: int = 5,
    nesterov: bool = True,
    consistent_rms: float = 0.2,
) -> optax.GradientTransformation:
    muon = optax.contrib.muon(
        schedule,
        beta=beta,
        ns_steps=ns_steps,
        nesterov=nesterov,
        consistent_rms=consistent_rms or None,
        mu_dtype=config.moment_dtype or None,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=_map_names(_matrix_axes),
    )
    return optax.partition(
        {"muon": muon, "adamw": _adamw(config, schedule)},
        _map_names(lambda name: "muon" if _matrix_axes(name) else "adamw"),
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


def _decayed(params: Any) -> Any:
    # By name: layers are stacked, so the scales of their norms are matrices too.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not re.search("norm|bias", jax.tree_util.keystr(path)), params
    )


def _map_names(function: Callable[[str], Any]) -> Callable[[Any], Any]:
    """Lifts a function of a parameter's name to trees of parameters."""

    def apply(path: tuple[Any, ...], _: Any) -> Any:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return function(names[-1])

    return lambda params: jax.tree_util.tree_map_with_path(apply, params)


def _matrix_axes(name: str) -> optax.contrib.MuonDimensionNumbers | None:
    """The input and output axes of a layer's matrix; None for all other parameters."""
    axes = (PARAM_AXES | ADAPTER_AXES).get(name, ())
    if "layers" not in axes or name not in OUTPUTS:
        return None
    first_input = 1 + OUTPUTS[name]  # After the layer axis and the output axes.
    return optax.contrib.MuonDimensionNumbers(
        reduction_axis=tuple(range(first_input, len(axes))),
        output_axis=tuple(range(1, first_input)),
    )
