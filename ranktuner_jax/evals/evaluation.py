"""Scores a model on held-out conversations."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from flax import nnx

from ranktuner_jax import losses
from ranktuner_jax.data import Batch, Example
from ranktuner_jax.evals.config import EvalConfig
from ranktuner_jax.evals.result import EvalResult, Preview
from ranktuner_jax.evals.sampler import divisible, generate
from ranktuner_jax.evals.stopping import stop_ids
from ranktuner_jax.evals.tasks import make_scorer
from ranktuner_jax.models import Decoder, partition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Progress", "RowSource", "evaluate", "score_rows"]

Progress = Callable[[int, int], None]
"""Called with (rows and questions done, all of them)."""


class RowSource(Protocol):
    """Rows by their index, as `data.load_rows` returns them: each a `Batch` of arrays [T]."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Batch[np.ndarray]: ...


def evaluate(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    rows: RowSource,
    examples: Sequence[Example] = (),
    config: EvalConfig = EvalConfig(),  # noqa: B008 (it is frozen)
    progress: Progress | None = None,
) -> EvalResult:
    """Scores held-out rows, and greedy answers to held-out questions when there is a task.

    The negative log-likelihood is the plain one, whatever loss trains the model, so that results
    of different losses compare. Nothing compiles in a second call with the same shapes.

    Over a mesh (`model.mesh`) rows and questions are divided over its batch axes. With several
    processes all must call, with the same rows and examples, and all get the result.

    Args:
      model: The decoder.
      tokenizer: Decodes completions and supplies the stop tokens; only questions need it.
      rows: Held-out rows, packed or padded; the first `config.rows` are scored.
      examples: Held-out questions; the first `config.examples` are answered if there is a task.
      config: The task, and the size of the evaluation.
      progress: Called as rows and questions are done.

    Raises:
      UserError: If the package that scores `config.task` is not installed.
      ValueError: If no row has a supervised token, or there are questions but no tokenizer.

    Example:
      >>> from ranktuner_jax.models import DecoderConfig
      >>> config = DecoderConfig(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2,
      ...                        num_kv_heads=1, head_dim=4, intermediate_size=16)
      >>> batch = Batch.of({"tokens": [[5, 6, 7]], "labels": [[6, 7, 0]], "mask": [[1, 1, 0]]})
      >>> rows = [jax.tree.map(lambda array: array[0], batch)]
      >>> evaluate(Decoder(config, rngs=nnx.Rngs(0)), rows=rows).tokens
      2
    """
    start = time.monotonic()
    scorer = make_scorer(config.task) if config.task else None
    num_rows = min(len(rows), config.rows)
    examples = list(examples[: config.examples]) if scorer else []
    if examples and tokenizer is None:
        raise ValueError(
            f"evaluate needs a tokenizer to ask questions: got {len(examples)} examples and "
            f"config.task={config.task!r}. Pass one, or leave the examples out."
        )
    total = num_rows + len(examples)

    def report(done: int) -> None:
        if progress is not None:
            progress(done, total)

    graphdef, params = nnx.split(model)
    nll = correct_tokens = tokens = 0.0
    done = 0
    batch_size = max(1, min(config.batch_size, num_rows))
    for count, batch in _batches(rows, num_rows, divisible(batch_size, model.mesh)):
        sums = jax.device_get(score_rows(graphdef, params, batch))
        nll += float(sums.total)
        tokens += float(sums.denom)
        correct_tokens += float(sums.metrics["correct"])
        done += count
        report(done)
    if not tokens:
        raise ValueError(f"the {num_rows} held-out rows have no supervised token: nothing to score")

    previews: list[Preview] = []
    correct: list[bool] = []
    finished = 0
    if scorer is not None and tokenizer is not None and examples:
        completions = generate(
            model,
            [example.prompt_tokens for example in examples],
            max_new_tokens=config.max_new_tokens,
            stop_ids=stop_ids(tokenizer),
            batch_size=config.prompts_per_batch,
            cache_gb=config.cache_gb,
            progress=lambda written: report(num_rows + written.done),
        )
        for example, completion in zip(examples, completions, strict=True):
            text = _decode(tokenizer, completion.tokens)
            right = bool(scorer(text, example.row))
            correct.append(right)
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
        correct=sum(correct),
        finished=finished,
        right=tuple(correct),
        digest=_digest(examples) if examples else "",
        previews=tuple(previews),
        seconds=time.monotonic() - start,
    )


def _digest(examples: Sequence[Example]) -> str:
    tokens = [
        [list(map(int, part)) for part in (example.prompt_tokens, example.completion_tokens)]
        for example in examples
    ]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def _batches(
    rows: RowSource, count: int, batch_size: int
) -> Iterator[tuple[int, Batch[np.ndarray]]]:
    """The first `count` rows in full batches: the last is filled with rows that do not count."""
    for start in range(0, count, batch_size):
        chosen = [rows[i] for i in range(start, min(start + batch_size, count))]
        filled = chosen + chosen[-1:] * (batch_size - len(chosen))
        batch = jax.tree.map(lambda *arrays: np.stack(arrays), *filled)
        counts = np.arange(batch_size) < len(chosen)
        yield len(chosen), dataclasses.replace(batch, mask=batch.mask & counts[:, None])


@functools.partial(jax.jit, static_argnames="graphdef")
def score_rows(
    graphdef: nnx.GraphDef[Decoder], params: nnx.State, batch: Batch[jax.Array]
) -> losses.LossOutput:
    """The sums over the supervised tokens of a batch [B, T], all of weight 1."""
    model = nnx.merge(graphdef, params)
    hidden = model(batch.tokens, batch.positions, batch.segment_ids)
    inputs = (*model.unembedding(hidden), batch.labels, batch.mask)
    options: dict[str, Any] = {"weighting": losses.SFT(), "vocab_size": model.vocab_size}
    if model.mesh is None:
        return losses.fused_weighted_nll(*inputs, **options)
    loss = losses.sharded_weighted_nll(
        model.mesh,
        batch_axes=partition.spec(model.mesh, ["batch"], hidden.shape)[0] or (),
        vocab_axis=model.unembed_spec[0],
        unembed_spec=model.unembed_spec,
        **options,
    )
    return loss(*inputs)
