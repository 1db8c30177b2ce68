"""The settings of a laboratory: one number an axis."""

from __future__ import annotations

import dataclasses

from ranktuner_jax.errors import UserError

__all__ = ["LabSettings"]


@dataclasses.dataclass(frozen=True)
class LabSettings:
    """What a laboratory's folder holds.

    The base model's text, the initial weights and the retention text depend on `seed` and
    `pretrain_rows` alone, so that one base model serves every setting of the other axes.

    Attributes:
      seed: Determines everything that is drawn.
      rows: Conversations in train.jsonl.
      contradict: Share of these, and of the questions, whose rules contradict what the base model
        has learnt.
      token_noise: Share of the training conversations with a random span of tokens.
      answer_noise: Share of them whose last result and answer are wrong.
      paraphrase: Share of the steps of all training conversations that are said in a way that is
        valid but rare in pretrain.jsonl.
      questions: Questions in target.jsonl, in ood.jsonl and in retention.jsonl.
      pretrain_rows: Conversations in pretrain.jsonl.

    Raises:
      UserError: If a number is out of its range.

    Example:
      >>> LabSettings(token_noise=0.2).rows
      512
    """

    seed: int = 0
    rows: int = 512
    contradict: float = 0.0
    token_noise: float = 0.0
    answer_noise: float = 0.0
    paraphrase: float = 0.0
    questions: int = 200
    pretrain_rows: int = 20_000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, float):
                if not 0 <= value <= 1:
                    raise UserError(f"--{field.name}: expected a share from 0 to 1, got {value:g}")
            elif value < (least := int(field.name != "seed")):
                raise UserError(f"--{field.name}: expected at least {least}, got {value}")
