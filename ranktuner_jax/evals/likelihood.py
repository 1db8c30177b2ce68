"""How likely a model finds texts that continue others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ranktuner_jax.evals.sampler import divisible
from ranktuner_jax.models import Decoder, partition

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int
    from transformers import PreTrainedTokenizerBase

__all__ = ["LogLikelihood", "encode_continuation", "log_likelihoods"]

# Positions whose logits exist at the same time, per row.
_CHUNK = 32
_WIDTH = 64  # Rows are padded to a multiple of it, so that few shapes are compiled.


class LogLikelihood(NamedTuple):
    """The log-probability of a continuation.

    Attributes:
      total: In nats, summed over its tokens.
      greedy: Whether each of its tokens is the likeliest one.
    """

    total: float
    greedy: bool


def encode_continuation(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """The tokens of a context and of what continues it, split at the same place as the text.

    Both are encoded together, as the model would read them; white space at the end of the context
    belongs to the continuation, since most tokens begin with a space. This is what lm-eval does.

    Returns:
      The tokens of the context, which begins with the tokenizer's first token if it has one, or
      the token that ends texts if it is empty; and those of the continuation.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        first = tokenizer.bos_token_id
        first = tokenizer.eos_token_id if first is None else first
        return [first], tokenizer.encode(continuation, add_special_tokens=False)
    start = tokenizer.encode(stripped)
    whole = tokenizer.encode(stripped + continuation)
    return start, whole[len(start) :]


def log_likelihoods(
    model: Decoder,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[LogLikelihood]:
    """The log-probability of each continuation, given its context.

    Over a mesh (`model.mesh`) pairs are divided over its batch axes. With several processes all
    must call, with the same pairs, and all get the result.

    Args:
      model: The decoder.
      pairs: Tokens of a context, at least one, and of its continuation.
      batch_size: Pairs scored together; raised to what the mesh divides.
      progress: Called with the number of pairs done, after each batch.

    Raises:
      ValueError: If a context or a continuation is empty.

    Example:
      >>> from ranktuner_jax.models import DecoderConfig
      >>> config = DecoderConfig(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2,
      ...                        num_kv_heads=1, head_dim=4, intermediate_size=16)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> [one] = log_likelihoods(model, [([1, 2], [3])])
      >>> bool(-4 < one.total < 0)
      True
    """
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(
                f"each pair needs a context and a continuation: pair {number} has "
                f"{len(context)} and {len(continuation)} tokens"
            )
    graphdef, params = nnx.split(model)
    lengths = [len(context) + len(continuation) - 1 for context, continuation in pairs]
    order = np.argsort(lengths, kind="stable")
    batch_size = divisible(min(batch_size, max(1, len(pairs))), model.mesh)
    results: dict[int, LogLikelihood] = {}
    for first in range(0, len(order), batch_size):
        group = order[first : first + batch_size]
        width = _round_up(max(lengths[i] for i in group), _WIDTH)
        scored = _round_up(max(len(pairs[i][1]) for i in group), _CHUNK)
        tokens = np.zeros((batch_size, width), np.int32)
        labels = np.zeros((batch_size, scored), np.int32)
        real, counts = np.zeros_like(tokens, bool), np.zeros_like(labels, bool)
        # On the right, so that the continuations of all rows are in the last columns.
        for row, i in enumerate(group):
            context, continuation = pairs[i]
            tokens[row, width - lengths[i] :] = [*context, *continuation][:-1]
            real[row, width - lengths[i] :] = True
            labels[row, scored - len(continuation) :] = continuation
            counts[row, scored - len(continuation) :] = True
        totals, greedy = jax.device_get(_score(graphdef, params, tokens, real, labels, counts))
        for row, i in enumerate(group):
            results[int(i)] = LogLikelihood(float(totals[row]), bool(greedy[row]))
        if progress is not None:
            progress(len(results))
    return [results[i] for i in range(len(pairs))]


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


@functools.partial(jax.jit, static_argnames="graphdef")
def _score(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    labels: Int[Array, "B C"],
    counts: Bool[Array, "B C"],
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """The sums of log-probabilities of the last C labels, and whether all are the likeliest."""
    model = nnx.merge(graphdef, params)
    tokens, real = (partition.constrain(x, model.mesh, "batch") for x in (tokens, real))
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    hidden = model(tokens, positions, real.astype(jnp.int32))[:, -labels.shape[1] :]

    def score(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, labels = chunk
        logits = model.logits(hidden)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
        return log_probs[..., 0], jnp.argmax(logits, axis=-1) == labels

    def chunked(array: Array) -> Array:
        """[B, C, ...] as [C / chunk, B, chunk, ...]."""
        split = array.reshape(array.shape[0], -1, _CHUNK, *array.shape[2:])
        return jnp.swapaxes(split, 0, 1)

    log_probs, likeliest = (
        jnp.swapaxes(x, 0, 1).reshape(labels.shape)
        for x in jax.lax.map(score, (chunked(hidden), chunked(labels)))
    )
    totals = jnp.sum(jnp.where(counts, log_probs, 0), axis=1)
    greedy = jnp.all(likeliest | ~counts, axis=1)
    # The same on every device, so that every process can read them.
    return partition.constrain(totals, model.mesh), partition.constrain(greedy, model.mesh)
