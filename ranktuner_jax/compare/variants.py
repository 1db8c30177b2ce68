"""The methods of a comparison, as the command line names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from ranktuner_jax.errors import UserError
from ranktuner_jax.train import TrainConfig

__all__ = ["Variant", "read_variants"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method with its options, and what its loss is divided by.

    Attributes:
      method: As on the command line, such as "ranktuner:base=one".
      normalize: "tokens" or "weights", see `LossConfig`.
      config: The config of its runs, but for the learning rate and the seed.
    """

    method: str
    normalize: Literal["tokens", "weights"]
    config: TrainConfig

    @property
    def name(self) -> str:
        """What the folder of its runs is called.

        Example:
          >>> Variant("ranktuner:base=one", "weights", TrainConfig()).name
          'ranktuner,base=one,by-weights'
        """
        return self.method.replace(":", ",") + ",by-weights" * (self.normalize == "weights")

    def with_run(self, rate: float, seed: int) -> TrainConfig:
        """The config of one of its runs."""
        optimizer = dataclasses.replace(self.config.optimizer, learning_rate=rate)
        return dataclasses.replace(self.config, optimizer=optimizer, seed=seed)


def read_variants(
    methods: str,
    normalize: str,
    load: Callable[[Sequence[str]], TrainConfig],
    baseline: str = "sft",
) -> list[Variant]:
    """Reads `--methods` and `--normalize`.

    Args:
      methods: Such as "sft,ranktuner:base=one:scale=exact".
      normalize: "tokens" or "tokens,weights".
      load: Returns the config with further overrides, such as "--config.loss.weighting=sft".
      baseline: The method that the others are compared with.

    Returns:
      The methods divided by tokens in the order given, then those divided by weights. SFT, all of
      whose weights are 1, is the same in both and occurs once.

    Raises:
      UserError: If a method or an option is unknown, a method occurs twice, or the baseline is
        missing.

    Example:
      >>> from ranktuner_jax.train import load_config
      >>> variants = read_variants("sft,ranktuner:base=one", "tokens,weights",
      ...                          lambda overrides: load_config("smollm2_chain_sum", overrides))
      >>> [variant.name for variant in variants]
      ['sft', 'ranktuner,base=one', 'ranktuner,base=one,by-weights']
      >>> variants[1].config.loss.make_weighting()
      RankTuner(base='one', scale='bound', clip=None)
    """
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if baseline not in names:
        raise UserError(
            f"--methods: expected {baseline} among them, which the others are compared with, got "
            f"{methods!r}; add it, or choose another --baseline"
        )
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--methods: expected each method once, got {sorted(twice)[0]} twice")
    if normalize not in ("tokens", "tokens,weights"):
        raise UserError(f"--normalize: expected tokens or tokens,weights, got {normalize!r}")
    variants = []
    for divisor in normalize.split(","):
        for name in names:
            if divisor == "weights" and name == "sft":
                continue
            weighting, *options = name.split(":")
            if stray := [option for option in options if "=" not in option]:
                raise UserError(
                    f"--methods: expected options such as base=one after {weighting}:, got "
                    f"{stray[0]!r}"
                )
            config = load(
                [
                    f"--config.loss.weighting={weighting}",
                    *(f"--config.loss.options.{option}" for option in options),
                    f"--config.loss.normalize={divisor}",
                ]
            )
            variants.append(Variant(name, config.loss.normalize, config))
    return variants
