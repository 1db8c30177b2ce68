"""Which data to read, and how to lay them out in rows."""

from __future__ import annotations

from dataclasses import dataclass

from ranktuner_jax.data.packing import PACKERS
from ranktuner_jax.errors import UserError

__all__ = ["DataConfig"]


@dataclass(frozen=True)
class DataConfig:
    """The training data, and how they are laid out in rows.

    Attributes:
      source: A built-in name, a file, a TFDS name or folder, or `hub:owner/name`;
        see `read_source`.
      split: Training split, in the notation of TFDS (`train`, `train[:10000]`).
      holdout: How much of the training split to hold out for `eval.split=holdout`: a fraction
        below 1, or a number of prompts; 0 for none. Conversations that begin with the same
        prompt stay together.
      mixture: Pairs (source, weight) to train on instead of `source`. Rows are drawn in
        proportion to the weights; each source is shuffled and repeated independently.
      subset: The configuration of a hub data set.
      data_dir: Where TFDS keeps its data sets; its own default when empty.
      prompt_column: Column of the prompt, if it has none of the usual names.
      completion_column: Column of the completion.
      chat_template: How conversations become text: empty for the tokenizer's own template,
        `plain` for a built-in one (for base models, which have none), or the path of a
        Jinja file. It replaces the tokenizer's, also in the exported model.
      system: A system prompt for conversations that have none.
      enable_thinking: Passed to the chat template; Qwen3's uses it.
      strip_calculator_marks: Whether to remove GSM8K's `<<48/2=24>>`.
      row_length: Tokens per row, the T of a batch.
      packing: Whether several conversations share a row.
      packer: Which ones do: `subset_sum` takes for each row those that fill it best; `best_fit`
        puts each into the fullest row with room, as all runs did up to version 0.2.
      widths: Without packing, how many widths rows have, from 1 to 4. A step has rows of one
        width, and is compiled for each. With 1 all rows have `row_length` tokens.
      on_bad_row: `error` reports the first bad row and stops; `skip` counts bad rows.
      too_long: How to treat a conversation longer than a row: `error`, `truncate` or `drop`;
        the last two are counted.
      cache: Where the tokens of a source are kept, so that it is tokenized once: `auto` for the
        user's cache if the source's files have 32 MB or more, `always` whatever they have, `never`,
        or a folder (also on `gs://`).

    Raises:
      UserError: If a value is not allowed.

    Example:
      >>> DataConfig("data/gsm8k", "train[:1000]", row_length=512).packing
      True
    """

    source: str = "chain_sum"
    split: str = "train"
    holdout: float = 0.0
    mixture: tuple[tuple[str, float], ...] = ()
    subset: str = ""
    data_dir: str = ""
    prompt_column: str = ""
    completion_column: str = ""
    chat_template: str = ""
    system: str = ""
    enable_thinking: bool = True
    strip_calculator_marks: bool = False
    row_length: int = 1024
    packing: bool = True
    packer: str = "subset_sum"
    widths: int = 1
    on_bad_row: str = "error"
    too_long: str = "error"
    cache: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("on_bad_row", ("error", "skip")),
            ("too_long", ("error", "truncate", "drop")),
            ("packer", tuple(PACKERS)),
            ("widths", (1, 2, 3, 4)),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"data.{name}: expected one of {', '.join(map(str, allowed))}, "
                    f"got {getattr(self, name)!r}"
                )
        if not (0 <= self.holdout < 1 or self.holdout % 1 == 0 < self.holdout):
            raise UserError(
                "data.holdout: expected a share below 1, or a whole number of prompts, got "
                f"{self.holdout}"
            )
        if self.row_length < 2:
            raise UserError(f"data.row_length: expected at least 2, got {self.row_length}")
        if self.packing and self.widths > 1:
            raise UserError(
                f"data.widths: expected 1 with data.packing, which fills rows, got {self.widths}; "
                "set data.packing=False"
            )
        if bool(self.prompt_column) != bool(self.completion_column):
            raise UserError(
                "data.prompt_column and data.completion_column: expected both or neither, got "
                f"{self.prompt_column!r} and {self.completion_column!r}"
            )
        for entry in self.mixture:
            if len(entry) != 2 or not isinstance(entry[0], str) or not entry[1] > 0:
                raise UserError(
                    f"data.mixture: expected pairs (source, weight above 0), got {entry!r}"
                )
        # JSON turns tuples into lists.
        object.__setattr__(self, "mixture", tuple(map(tuple, self.mixture)))
