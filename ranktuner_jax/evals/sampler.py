"""Batched sampling with a key-value cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ranktuner_jax.models import Decoder, partition

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

__all__ = ["Completion", "divisible", "generate"]


class Completion(NamedTuple):
    """The tokens that a model wrote before the stop token, and whether it reached one."""

    tokens: list[int]
    finished: bool


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    batch_size: int = 64,
    temperature: float = 0.0,
    key: Array | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Continues each prompt until a stop token or `max_new_tokens`.

    Prompts of similar length share a batch, padded on the left to one of at most two widths, so
    that a call compiles at most twice; later calls with the same shapes compile nothing. A batch
    ends as soon as all of its rows have stopped. A row's completion does not depend on the rows
    beside it: positions start at its own first token, padding is never attended to, and random
    numbers are drawn from `(key, index of the prompt, step)`.

    Over a mesh (`model.mesh`) prompts are divided over its batch axes. With several processes all
    must call, with the same prompts, and all get every completion.

    Args:
      model: The decoder.
      prompts: Token ids, at least one each.
      max_new_tokens: The most tokens to write, stop token included.
      stop_ids: Tokens that end a completion.
      batch_size: Prompts decoded together.
      temperature: 0 takes the likeliest token (the lowest id in a tie); otherwise tokens are
        drawn from `softmax(logits / temperature)`.
      key: The PRNG key; needed when `temperature` is positive.
      progress: Called with the number of prompts done, after each batch.

    Returns:
      One completion per prompt, in the order of `prompts`.

    Raises:
      ValueError: If a prompt is empty, a size is below one, the temperature is negative, or it is
        positive without a key.

    Example:
      >>> from ranktuner_jax.models import Decoder, DecoderConfig
      >>> config = DecoderConfig(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2,
      ...                        num_kv_heads=1, head_dim=4, intermediate_size=16)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> [c] = generate(model, [[1, 2, 3]], max_new_tokens=4, stop_ids=[0])
      >>> len(c.tokens) <= 4
      True
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            "batch_size and max_new_tokens must be at least 1: "
            f"got {batch_size} and {max_new_tokens}"
        )
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(
            f"temperature must be 0, or positive with a key: got {temperature} and key {key}"
        )
    lengths = [len(prompt) for prompt in prompts]
    if not all(lengths):
        raise ValueError(f"every prompt needs a token: prompt {lengths.index(0)} is empty")
    if not prompts:
        return []

    graphdef, params = nnx.split(model)
    key = jax.random.key(0) if key is None else key
    order = np.argsort(lengths, kind="stable")
    batch_size = divisible(min(batch_size, len(prompts)), model.mesh)
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    completions: dict[int, Completion] = {}
    for group, width in zip(groups, _widths([lengths[g[-1]] for g in groups]), strict=True):
        tokens = np.zeros((batch_size, width), np.int32)
        prompt_lengths = np.zeros(batch_size, np.int32)
        index = np.zeros(batch_size, np.int32)
        for row, i in enumerate(group):
            tokens[row, width - lengths[i] :] = prompts[i]
            prompt_lengths[row], index[row] = lengths[i], i
        written, count = _decode(
            graphdef,
            params,
            tokens,
            prompt_lengths,
            np.asarray(stop_ids, np.int32),
            jax.vmap(jax.random.fold_in, (None, 0))(key, index),
            np.float32(temperature),
            max_new_tokens=max_new_tokens,
            greedy=temperature == 0,
        )
        written, count = jax.device_get((written, count))
        for row, i in enumerate(group):
            text = written[row, : count[row]].tolist()
            finished = bool(text) and text[-1] in stop_ids
            completions[int(i)] = Completion(text[:-1] if finished else text, finished)
        if progress is not None:
            progress(len(completions))
    return [completions[i] for i in range(len(prompts))]


def divisible(batch_size: int, mesh: Mesh | None) -> int:
    """The smallest size, `batch_size` or more, that divides over the mesh's batch axes.

    Example:
      >>> divisible(3, None)
      3
    """
    if mesh is None:
        return batch_size
    axes = [axis for axis in partition.RULES["batch"] if axis in mesh.shape]
    return _round_up(batch_size, math.prod(mesh.shape[axis] for axis in axes))


def _widths(longest: Sequence[int]) -> list[int]:
    """The padded width of each batch, from the ascending lengths of their longest prompts.

    At most two widths: the narrower is worth its compilation if it saves a fifth of the tokens.
    """
    wide = _round_up(longest[-1])
    candidates = [(count, _round_up(longest[count - 1])) for count in range(1, len(longest))]
    saved = [count * (wide - narrow) for count, narrow in candidates]
    if saved and max(saved) > 0.2 * wide * len(longest):
        count, narrow = candidates[int(np.argmax(saved))]
        return [narrow] * count + [wide] * (len(longest) - count)
    return [wide] * len(longest)


def _round_up(length: int, multiple: int = 8) -> int:
    return -(-length // multiple) * multiple


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "greedy"))
def _decode(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    stop_ids: Int[Array, " S"],
    keys: Array,
    temperature: Float[Array, ""],
    *,
    max_new_tokens: int,
    greedy: bool,
) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
    """The tokens written, and their number in each row; a row of length 0 is absent."""
    model = nnx.merge(graphdef, params)
    tokens, lengths, keys = (
        partition.constrain(x, model.mesh, "batch") for x in (tokens, lengths, keys)
    )
    batch, width = tokens.shape
    # An absent row still attends to its last column: a softmax over nothing is NaN.
    positions = jnp.arange(width)[None, :] - (width - jnp.maximum(lengths, 1))[:, None]
    real = positions >= 0

    def pick(hidden: Float[Array, "B D"], step: Int[Array, ""]) -> Int[Array, " B"]:
        logits = model.logits(hidden)
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        drawn = jax.vmap(jax.random.categorical)(step_keys, logits / temperature)
        return drawn.astype(jnp.int32)

    def is_stop(token: Int[Array, " B"]) -> Bool[Array, " B"]:
        return (token[:, None] == stop_ids[None, :]).any(axis=-1)

    hidden, cache = model(
        tokens,
        jnp.maximum(positions, 0),
        real.astype(jnp.int32),
        cache=model.init_cache(batch, width + max_new_tokens),
    )
    absent = lengths == 0
    first = pick(hidden[:, -1], jnp.int32(0))
    written = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(first)
    count = jnp.where(absent, 0, 1)

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        step, _, done, *_ = carry
        return (step < max_new_tokens) & ~done.all()

    def write_one(carry: tuple) -> tuple:
        step, token, done, written, count, cache = carry
        hidden, cache = model(
            token[:, None],
            (lengths + step - 1)[:, None],
            jnp.ones((batch, 1), jnp.int32),
            cache=cache,
        )
        token = pick(hidden[:, -1], step)
        written = written.at[:, step].set(token)
        count = count + ~done
        return step + 1, token, done | is_stop(token), written, count, cache

    start = (jnp.int32(1), first, absent | is_stop(first), written, count, cache)
    _, _, _, written, count, _ = jax.lax.while_loop(unfinished, write_one, start)
    # The same on every device, so that every process can read them.
    return partition.constrain(written, model.mesh), partition.constrain(count, model.mesh)
