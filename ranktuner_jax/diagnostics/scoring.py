"""Statistics of every supervised token under a model, and the weights that follow from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ranktuner_jax import losses
from ranktuner_jax.data import Batch
from ranktuner_jax.errors import UserError
from ranktuner_jax.models import Decoder, partition

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

__all__ = ["ALL_FIELDS", "TokenScorer", "audit_methods", "in_blocks", "method_weights"]

ALL_FIELDS = ("expected_rank", "topk_entropy", "collision")
"""The optional statistics, all of which an audit has."""

# Numbers of tokens are rounded up to a multiple of it, so that few shapes are compiled.
_BLOCK = 16384
# Positions of a row whose logits exist at the same time.
_CHUNK = 32


class TokenScorer:
    """Scores batches with one compiled program for each shape of batch.

    Over a mesh (`model.mesh`) rows are divided over its batch axes, which must divide them
    (`evals.sampler.divisible`). With several processes all must call, with the same batches, and
    all get all results.

    Args:
      model: The decoder; its parameters are those at this moment.
      fields: The optional statistics to compute.

    Example:
      >>> from ranktuner_jax.models import DecoderConfig
      >>> config = DecoderConfig(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2,
      ...                        num_kv_heads=1, head_dim=4, intermediate_size=16)
      >>> scorer = TokenScorer(Decoder(config, rngs=nnx.Rngs(0)))
      >>> batch = Batch.of({"tokens": [[5, 6, 7]], "labels": [[6, 7, 0]], "mask": [[1, 1, 0]]})
      >>> stats = jax.device_get(scorer(batch))
      >>> stats.nll.shape, stats.rank[batch.mask].shape
      ((1, 3), (2,))
    """

    def __init__(self, model: Decoder, fields: Collection[str] = ALL_FIELDS) -> None:
        self._graphdef, self._params = nnx.split(model)
        self._vocab_size = model.vocab_size
        self._fields = tuple(sorted(fields))

    def __call__(self, batch: Batch[Any]) -> losses.TokenStats:
        """The statistics of a batch, arrays [B, T] that are 0 where the mask is false.

        The computation goes on after the return: `jax.device_get` waits for it.
        """
        return _score(
            self._graphdef,
            self._fields,
            self._params,
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            batch.labels,
            batch.mask,
        )

    def likeliest(self, batch: Batch[Any], count: int = 5) -> tuple[Array, Array]:
        """The likeliest tokens at every position of a batch, the likeliest first.

        Args:
          batch: Rows [B, T].
          count: How many; the whole vocabulary where it is smaller.

        Returns:
          Their ids and their probabilities, arrays [B, T, count].
        """
        return _likeliest(
            self._graphdef,
            min(count, self._vocab_size),
            self._params,
            batch.tokens,
            batch.positions,
            batch.segment_ids,
        )


@functools.partial(jax.jit, static_argnames=("graphdef", "fields"))
def _score(
    graphdef: nnx.GraphDef[Decoder],
    fields: tuple[str, ...],
    params: nnx.State,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    labels: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> losses.TokenStats:
    model = nnx.merge(graphdef, params)
    hidden = model(tokens, positions, segment_ids)
    inputs = (*model.unembedding(hidden), labels, mask)
    options: dict[str, Any] = {"fields": fields, "vocab_size": model.vocab_size}
    if model.mesh is None:
        return losses.fused_token_stats(*inputs, **options)
    stats = losses.sharded_token_stats(
        model.mesh,
        batch_axes=partition.spec(model.mesh, ["batch"], hidden.shape)[0] or (),
        vocab_axis=model.unembed_spec[0],
        unembed_spec=model.unembed_spec,
        **options,
    )(*inputs)
    # The same on every device, so that every process can read them.
    return jax.tree.map(lambda array: partition.constrain(array, model.mesh), stats)


@functools.partial(jax.jit, static_argnames=("graphdef", "count"))
def _likeliest(
    graphdef: nnx.GraphDef[Decoder],
    count: int,
    params: nnx.State,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
    model = nnx.merge(graphdef, params)
    hidden = model(tokens, positions, segment_ids)
    (rows, length), chunk = tokens.shape, min(_CHUNK, tokens.shape[1])
    padded = -(-length // chunk) * chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padded - length), (0, 0)))
    chunks = jnp.swapaxes(hidden.reshape(rows, -1, chunk, hidden.shape[-1]), 0, 1)

    def top(hidden: Float[Array, "B C D"]) -> tuple[Array, Array]:
        logits = model.logits(hidden)
        highest, ids = jax.lax.top_k(logits, count)
        return ids, jnp.exp(highest - jax.nn.logsumexp(logits, axis=-1, keepdims=True))

    def whole(chunks: Array) -> Array:
        joined = jnp.swapaxes(chunks, 0, 1).reshape(rows, padded, count)[:, :length]
        return partition.constrain(joined, model.mesh)

    ids, probs = jax.lax.map(top, chunks)
    return whole(ids), whole(probs)


def method_weights(
    stats: losses.TokenStats,
    methods: Mapping[str, losses.Weighting],
    batch_stats: Mapping[str, float] | None = None,
) -> dict[str, np.ndarray]:
    """The weights that methods give to tokens.

    Args:
      stats: Statistics of N tokens, arrays [N], with all fields that the methods require.
      methods: The methods by name, as `audit_methods` returns them.
      batch_stats: By name, the statistic of the whole data set for methods that use one (TALR's τ).

    Returns:
      float32 weights [N] by name.

    Example:
      >>> stats = losses.token_stats(jnp.zeros((2, 4)), jnp.array([0, 1]), ALL_FIELDS)
      >>> {name: w.tolist() for name, w in method_weights(stats, {"dft": losses.DFT()}).items()}
      {'dft': [0.25, 0.25]}
    """
    given = {name: np.float32(value) for name, value in (batch_stats or {}).items()}
    weigh = functools.partial(_weights, tuple(methods.items()), given)
    weights = in_blocks(weigh, stats)
    return {name: np.asarray(weights[name], np.float32) for name in methods}


def in_blocks(
    function: Callable[[losses.TokenStats], dict[str, Array]], stats: losses.TokenStats
) -> dict[str, np.ndarray]:
    """Calls a function of arrays [N] with N rounded up, so that it is compiled for few sizes.

    Args:
      function: Takes and returns arrays [N].
      stats: Its argument.
    """
    tokens = len(stats.nll)
    padded = jax.tree.map(lambda array: np.pad(np.asarray(array), (0, -tokens % _BLOCK)), stats)
    return {name: array[:tokens] for name, array in jax.device_get(function(padded)).items()}


@functools.partial(jax.jit, static_argnames="methods")
def _weights(
    methods: tuple[tuple[str, losses.Weighting], ...],
    batch_stats: dict[str, Array],
    stats: losses.TokenStats,
) -> dict[str, Float[Array, "N"]]:
    return {name: method(stats, batch_stats.get(name)) for name, method in methods}


def audit_methods(own: losses.Weighting | None = None) -> dict[str, losses.Weighting]:
    """The methods of an audit by name: all in `losses.WEIGHTINGS`, and the forms of RankTuner.

    First those that come with the package, with their default options; then RankTuner with either
    base and either scale; then those that a user registered.

    Args:
      own: The weighting of a config; it is added as "config" if it differs from all others.

    Raises:
      UserError: If a registered method cannot be made without options.

    Example:
      >>> list(audit_methods())[-5:]
      ['entropy', 'ranktuner', 'ranktuner_one', 'ranktuner_exact', 'ranktuner_one_exact']
      >>> audit_methods(losses.RankTuner("one", clip=5.0))["config"].clip
      5.0
    """
    shipped: dict[str, losses.Weighting] = {}
    registered: dict[str, losses.Weighting] = {}
    for name, method in losses.WEIGHTINGS.items():
        try:
            made = method()
        except (TypeError, ValueError) as error:
            raise UserError(
                f"losses.WEIGHTINGS[{name!r}]: expected a method whose options have defaults, so "
                f"that it can be audited, got {error}"
            ) from error
        ours = method.__module__.startswith(f"{losses.__name__}.")
        (shipped if ours else registered)[name] = made
    shipped.pop("ranktuner", None)
    methods = {
        **shipped,
        "ranktuner": losses.RankTuner("prob", "bound"),
        "ranktuner_one": losses.RankTuner("one", "bound"),
        "ranktuner_exact": losses.RankTuner("prob", "exact"),
        "ranktuner_one_exact": losses.RankTuner("one", "exact"),
        **registered,
    }
    if own is not None and own not in methods.values():
        methods["config"] = own
    return methods
