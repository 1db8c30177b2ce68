"""How well a model does on held-out conversations."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from flax import nnx

from ranktuner_jax import losses
from ranktuner_jax.data import Example, turn_end_id
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.sampler import divisible, generate
from ranktuner_jax.evals.tasks import TASKS, make_scorer
from ranktuner_jax.models import Decoder, param_shardings, partition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "EvalConfig",
    "EvalResult",
    "Preview",
    "evaluate",
    "stop_ids",
    "wilson_interval",
]

Row = Mapping[str, np.ndarray]


class RowSource(Protocol):
    """Rows by their index, as `data.load_rows` returns them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...


Progress = Callable[[int, int], None]
"""Called with (rows and questions done, all of them)."""

ROW_KEYS = ("tokens", "labels", "mask", "positions", "segment_ids")
# Ends of a turn in the chat templates of the families that models/ reads; which of them a
# tokenizer has, it knows itself.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What an evaluation looks at.

    Attributes:
      every_steps: Evaluate every so many training steps; 0 for before and after training only.
      split: The held-out split of the data.
      rows: At most so many rows of the split are scored for the negative log-likelihood.
      batch_size: Rows scored together; more where all devices would not have one.
      task: A name in `TASKS` by which greedy completions are scored: chain_sum, gsm_symbolic, exact
        (the row's `answer`, to the letter) or auto (by `answer`, in rows that have one); empty
        for none.
      examples: At most so many questions of the split are answered.
      prompts_per_batch: Questions answered together; more where all devices would not have one.
      max_new_tokens: The longest completion.
      previews: Completions kept to be read by people.
    """

    every_steps: int = 0
    split: str = "test"
    rows: int = 256
    batch_size: int = 16
    task: str = ""
    examples: int = 256
    prompts_per_batch: int = 64
    max_new_tokens: int = 32
    previews: int = 3

    def __post_init__(self) -> None:
        if self.task and self.task not in TASKS:
            raise UserError(
                f"eval.task: expected one of {', '.join(TASKS)}, or '' for none, got {self.task!r}"
            )
        for name in ("rows", "batch_size", "examples", "prompts_per_batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"eval.{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("every_steps", "previews"):
            if getattr(self, name) < 0:
                raise UserError(f"eval.{name}: expected at least 0, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Preview:
    """One question, what was expected and what came."""

    question: str
    expected: str
    completion: str
    correct: bool


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
      nll: Mean negative log-likelihood of a supervised token in nats, unweighted.
      token_accuracy: Share of supervised tokens that are the model's first choice.
      tokens: Supervised tokens scored.
      questions: Questions answered; 0 without a task.
      correct: Answers that the task's scorer calls right.
      finished: Completions that ended by themselves.
      previews: A few completions.
      seconds: What the evaluation took.
    """

    nll: float
    token_accuracy: float
    tokens: int
    questions: int = 0
    correct: int = 0
    finished: int = 0
    previews: tuple[Preview, ...] = ()
    seconds: float = 0.0

    @property
    def accuracy(self) -> float | None:
        """Share of questions answered rightly; None without questions."""
        return self.correct / self.questions if self.questions else None

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """Its 95 % Wilson interval."""
        return wilson_interval(self.correct, self.questions) if self.questions else None

    def metrics(self) -> dict[str, float]:
        """Numbers for a log.

        Example:
          >>> EvalResult(nll=0.0, token_accuracy=1.0, tokens=9).metrics()
          {'nll': 0.0, 'perplexity': 1.0, 'token_accuracy': 1.0}
        """
        numbers = {
            "nll": self.nll,
            # exp of a diverged model's nll does not fit into a float.
            "perplexity": math.exp(min(self.nll, 700.0)),
            "token_accuracy": self.token_accuracy,
        }
        if self.accuracy is not None and self.accuracy_interval is not None:
            low, high = self.accuracy_interval
            numbers |= {
                "accuracy": self.accuracy,
                "accuracy_low": low,
                "accuracy_high": high,
                "finished": self.finished / self.questions,
            }
        return numbers

    def to_json(self) -> dict[str, Any]:
        """A dict that `from_json` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> EvalResult:
        """The result that `to_json` wrote.

        Example:
          >>> import json
          >>> result = EvalResult(nll=1.5, token_accuracy=0.5, tokens=8)
          >>> EvalResult.from_json(json.loads(json.dumps(result.to_json()))) == result
          True
        """
        previews = tuple(Preview(**preview) for preview in saved["previews"])
        return cls(**{**saved, "previews": previews})


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share, at 95 % unless `z` says otherwise.

    Raises:
      ValueError: If not `0 <= correct <= total` with `total >= 1`.

    Example:
      >>> low, high = wilson_interval(64, 256)
      >>> round(low, 3), round(high, 3)
      (0.201, 0.306)

    References:
      Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"expected 0 <= correct <= total and total >= 1: got {correct}, {total}")
    share = correct / total
    scale = 1 + z**2 / total
    center = (share + z**2 / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / scale
    return max(0.0, center - half), min(1.0, center + half)


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an assistant's turn.

    They are the end of the sequence, the ends of turns that are known of model families and are
    in the tokenizer, and what the chat template ends a turn with, where there is a template.

    Raises:
      UserError: If there is a chat template that refuses even a short conversation.
    """
    added = tokenizer.get_added_vocab()
    ends = {added[end] for end in _TURN_ENDS if end in added}
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        ends.add(turn_end_id(tokenizer))
    return sorted(ends)


def evaluate(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: RowSource,
    examples: Sequence[Example],
    config: EvalConfig,
    progress: Progress | None = None,
) -> EvalResult:
    """Scores held-out rows, and greedy answers to held-out questions when there is a task.

    The negative log-likelihood is the plain one whatever loss trains the model: results of
    different losses compare. Nothing compiles in a second call with the same shapes.

    Over a mesh (`model.mesh`) rows and questions are divided over its batch axes. With several
    processes all must call, with the same rows and examples, and all get the result.

    Args:
      model: The decoder.
      tokenizer: Turns completions into text, and knows where a turn ends.
      rows: Held-out rows, packed or padded; the first `config.rows` are scored.
      examples: Held-out questions; the first `config.examples` are answered.
      config: How much is looked at, and how.
      progress: Called as rows and questions are done.

    Raises:
      UserError: If `config.task` is unknown or cannot be scored here.
      ValueError: If no row has a supervised token.
    """
    start = time.monotonic()
    scorer = make_scorer(config.task) if config.task else None
    num_rows = min(len(rows), config.rows)
    examples = list(examples[: config.examples]) if scorer else []
    total = num_rows + len(examples)

    def report(done: int) -> None:
        if progress is not None:
            progress(done, total)

    graphdef, params = nnx.split(model)
    nll = correct_tokens = tokens = 0.0
    done = 0
    batch_size = max(1, min(config.batch_size, num_rows))
    for count, batch in _batches(rows, num_rows, divisible(batch_size, model.mesh)):
        sums = jax.device_get(_score_rows(graphdef, params, batch))
        nll += float(sums.total)
        tokens += float(sums.denom)
        correct_tokens += float(sums.metrics["correct"])
        done += count
        report(done)
    if not tokens:
        raise ValueError(f"the {num_rows} held-out rows have no supervised token: nothing to score")

    previews: list[Preview] = []
    correct = finished = 0
    if scorer is not None and examples:
        completions = generate(
            model,
            [example.prompt_tokens for example in examples],
            max_new_tokens=config.max_new_tokens,
            stop_ids=stop_ids(tokenizer),
            batch_size=config.prompts_per_batch,
            progress=lambda answered: report(num_rows + answered),
        )
        for example, completion in zip(examples, completions, strict=True):
            text = _decode(tokenizer, completion.tokens)
            right = scorer(text, example.row)
            correct += right
            finished += completion.finished
            if len(previews) < config.previews:
                asked = (m["content"] for m in reversed(example.messages) if m["role"] == "user")
                question = next(asked, "")
                expected = _decode(tokenizer, example.completion_tokens)
                previews.append(Preview(question, expected, text, right))
    return EvalResult(
        nll=nll / tokens,
        token_accuracy=correct_tokens / tokens,
        tokens=int(tokens),
        questions=len(examples),
        correct=correct,
        finished=finished,
        previews=tuple(previews),
        seconds=time.monotonic() - start,
    )


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def _batches(
    rows: RowSource, count: int, batch_size: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The first `count` rows in full batches: the last is filled with rows that do not count."""
    for start in range(0, count, batch_size):
        chosen = [rows[i] for i in range(start, min(start + batch_size, count))]
        filled = chosen + chosen[-1:] * (batch_size - len(chosen))
        batch = {key: np.stack([row[key] for row in filled]) for key in ROW_KEYS}
        batch["mask"][len(chosen) :] = False
        yield len(chosen), batch


@functools.partial(jax.jit, static_argnames="graphdef")
def _score_rows(
    graphdef: nnx.GraphDef[Decoder], params: nnx.State, batch: dict[str, jax.Array]
) -> losses.LossOutput:
    model = nnx.merge(graphdef, params)
    hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    inputs = (hidden, model.unembed, batch["labels"], batch["mask"])
    options: dict[str, Any] = {"weighting": losses.SFT(), "vocab_size": model.vocab_size}
    if model.mesh is None:
        return losses.fused_weighted_nll(*inputs, **options)
    unembed_spec = param_shardings({"head": model.unembed}, model.mesh)["head"].spec
    loss = losses.sharded_weighted_nll(
        model.mesh,
        batch_axes=partition.spec(model.mesh, ["batch"], hidden.shape)[0] or (),
        vocab_axis=unembed_spec[0],
        unembed_spec=unembed_spec,
        **options,
    )
    return loss(*inputs)
