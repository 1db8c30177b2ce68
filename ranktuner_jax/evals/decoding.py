"""The compiled programs of the sampler: prompts into a cache, and tokens after them.

All rows write to the same slot of the cache, so that a step writes one slice of it. A row's tokens
end at that slot, wherever they began, and what lies before them is masked. The prompt that takes
the place of a row that is done ends there too.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ranktuner_jax.evals.choosing import Rule, choose
from ranktuner_jax.evals.memory import release_memory
from ranktuner_jax.models import Cache, Decoder, Quantized, partition

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int

__all__ = [
    "Prefilled",
    "Rows",
    "Weights",
    "admit",
    "decode",
    "empty",
    "move",
    "prefill",
    "split",
]

Graph = nnx.GraphDef[Decoder]


class Weights(NamedTuple):
    """A decoder's parameters in the dtype of its arithmetic, those of the layers one by one."""

    params: nnx.State
    layers: list[nnx.State]


class Asked(NamedTuple):
    """What is asked of each row: the most tokens, and by which numbers it draws random ones."""

    limit: Int[Array, " B"] | np.ndarray
    question: Int[Array, " B"] | np.ndarray
    sample: Int[Array, " B"] | np.ndarray


class Prefilled(NamedTuple):
    """New rows: their prompts in a cache of their own, and the first token after each."""

    cache: Cache
    token: Int[Array, " R"]
    position: Int[Array, " R"]
    asked: Asked


class Rows(NamedTuple):
    """What is being written.

    Attributes:
      cache: The prompts, and all tokens written but the last.
      token: The last token.
      position: Its position.
      asked: What is asked of each row.
      written: The number of tokens written.
      done: Whether the row has ended, or was never begun.
    """

    cache: Cache
    token: Int[Array, " B"]
    position: Int[Array, " B"]
    asked: Asked
    written: Int[Array, " B"]
    done: Bool[Array, " B"]


def split(graph: Graph, params: nnx.State) -> Weights:
    """The weights as the other programs take them: sliced and cast once, not at every token."""
    rest = nnx.State({name: value for name, value in params.items() if name != "layers"})
    rest, layers = _cast(graph, params, rest)
    # A prefill scans over the stacked layers, which cost no memory as they came.
    return Weights(nnx.State({**rest, "layers": params["layers"]}), layers)


@functools.partial(jax.jit, static_argnames="graph")
def _cast(graph: Graph, params: nnx.State, rest: nnx.State) -> tuple[nnx.State, list[nnx.State]]:
    model = nnx.merge(graph, params)

    def is_quantized(leaf: Any) -> bool:
        return isinstance(leaf, Quantized)

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        # Norms scale in float32, and quantised matrices stay small.
        is_norm = any(str(getattr(key, "key", "")).endswith("norm") for key in path)
        return leaf if is_norm or is_quantized(leaf) else leaf.astype(model.dtype)

    rest, wanted = (
        jax.tree_util.tree_map_with_path(cast, state, is_leaf=is_quantized)
        for state in (rest, params)
    )
    return rest, nnx.merge(graph, wanted).split_layers()


@functools.partial(jax.jit, static_argnames=("graph", "batch_size", "length"))
def empty(graph: Graph, params: nnx.State, *, batch_size: int, length: int) -> Rows:
    """Rows that were never begun, with a cache of `length` slots."""
    model = nnx.merge(graph, params)
    zeros = jnp.zeros(batch_size, jnp.int32)
    cache = model.init_cache(batch_size, length)
    asked = Asked(zeros, zeros, zeros)
    return _placed(Rows(cache, zeros, zeros, asked, zeros, zeros == 0), model.mesh)


@functools.partial(jax.jit, static_argnames="graph")
def prefill(
    graph: Graph,
    weights: Weights,
    tokens: Int[Array, "R W"],
    lengths: Int[Array, " R"],
    asked: Asked,
    seed: Int[Array, ""],
    rule: Rule,
) -> Prefilled:
    """Reads left-padded prompts; a row of length 0 is absent."""
    model = nnx.merge(graph, weights.params)
    tokens, lengths, asked = _placed((tokens, lengths, asked), model.mesh)
    rows, width = tokens.shape
    positions = jnp.arange(width)[None, :] - (width - lengths)[:, None]
    segment_ids = (positions >= 0).astype(jnp.int32)
    hidden, cache = model.prefill(tokens, jnp.maximum(positions, 0), segment_ids)
    first = jnp.zeros(rows, jnp.int32)
    token = choose(model.logits(hidden[:, -1]), rule, _keys(seed, asked), first)
    return _placed(Prefilled(cache, token, lengths, asked), model.mesh)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="rows")
def admit(
    rows: Rows, new: Prefilled, source: Int[Array, " B"], stop_ids: Array, *, mesh: Mesh | None
) -> tuple[Rows, Int[Array, " R"]]:
    """Puts new rows in the place of old ones.

    Args:
      rows: The old ones; the next slot of their cache is at least the new ones' width.
      new: The new ones.
      source: For each row which of the new ones replaces it, -1 for none.
      stop_ids: Tokens that end a row.
      mesh: Where they lie.

    Returns:
      The rows, and the first tokens of the new ones, the same on every device.
    """
    replaced = source >= 0
    width = new.cache.positions.shape[1]
    start = rows.cache.index - width

    def pick(new: Array, old: Array) -> Array:
        mask = replaced.reshape(-1, *(1,) * (old.ndim - 1))
        return jnp.where(mask, new[jnp.maximum(source, 0)], old)

    def place(old: Array, new: Array, axis: int) -> Array:
        slots = jax.lax.dynamic_slice_in_dim(old, start, width, axis)
        return jax.lax.dynamic_update_slice_in_dim(old, pick(new, slots), start, axis)

    old, added = rows.cache, new.cache
    cleared = jnp.where(replaced[:, None], -1, old.segment_ids)
    cache = Cache(
        keys=tuple(place(a, b, 3) for a, b in zip(old.keys, added.keys, strict=True)),
        values=tuple(place(a, b, 2) for a, b in zip(old.values, added.values, strict=True)),
        positions=place(old.positions, added.positions, 1),
        # Slots of padding hold nothing.
        segment_ids=place(cleared, jnp.where(added.segment_ids > 0, 1, -1), 1),
        index=old.index,
    )
    one = jnp.ones_like(new.token)
    admitted = Rows(
        cache=cache,
        token=pick(new.token, rows.token),
        position=pick(new.position, rows.position),
        asked=jax.tree.map(pick, new.asked, rows.asked),
        written=pick(one, rows.written),
        done=pick(_ended(new.token, one, new.asked, stop_ids), rows.done),
    )
    return _placed(admitted, mesh), partition.constrain(new.token, mesh)


@functools.partial(jax.jit, static_argnames=("graph", "buffer"), donate_argnames="rows")
def decode(
    graph: Graph,
    weights: Weights,
    rows: Rows,
    stop_ids: Int[Array, " S"],
    seed: Int[Array, ""],
    rule: Rule,
    steps: Int[Array, ""],
    until: Int[Array, ""],
    *,
    buffer: int,
) -> tuple[Rows, Int[Array, "B buffer"], Int[Array, " B"], Int[Array, ""]]:
    """Writes tokens until `until` rows are done, for at most `steps` steps.

    Returns:
      The rows; the tokens chosen at each step, in the first of `buffer` columns; the number of
      tokens that each row has written in all; and the number of steps.
    """
    model = nnx.merge(graph, weights.params)
    keys = _keys(seed, rows.asked)

    def unfinished(carry: tuple[Array, Rows, Array]) -> Array:
        step, rows, _ = carry
        return (step < steps) & (jnp.sum(rows.done) < until)

    def write_one(carry: tuple[Array, Rows, Array]) -> tuple[Array, Rows, Array]:
        step, rows, out = carry
        hidden, cache = model(
            rows.token[:, None],
            # A row that is done goes on writing, for nobody, and not at ever larger positions.
            jnp.where(rows.done, 0, rows.position)[:, None],
            jnp.ones_like(rows.token)[:, None],
            cache=rows.cache,
            layers=weights.layers,
        )
        token = choose(model.logits(hidden[:, -1]), rule, keys, rows.written)
        written = rows.written + ~rows.done
        done = rows.done | _ended(token, written, rows.asked, stop_ids)
        rows = Rows(cache, token, rows.position + 1, rows.asked, written, done)
        return step + 1, rows, out.at[:, step].set(token)

    out = jnp.zeros((rows.token.shape[0], buffer), jnp.int32)
    step, rows, out = jax.lax.while_loop(unfinished, write_one, (jnp.int32(0), rows, out))
    # The same on every device, so that every process can read them.
    out, written = (partition.constrain(x, model.mesh) for x in (out, rows.written))
    return _placed(rows, model.mesh), out, written, step


def move(rows: Rows, by: int, *, length: int, mesh: Mesh | None) -> Rows:
    """The rows with a cache of `length` slots, in which all tokens lie `by` slots further on.

    One array after the other, so that there is hardly more than one cache in memory.

    Args:
      rows: The rows, whose cache is given up.
      by: How far tokens move; backwards if it is negative.
      length: Slots of the new cache.
      mesh: Where they lie.
    """

    def moved(x: Array, axis: int) -> Array:
        result = _move(x, np.int32(by), axis=axis, length=length, mesh=mesh)
        jax.block_until_ready(result)  # Until then the old array is in use.
        x.delete()
        release_memory()
        return result

    old = rows.cache
    slots = (old.positions, old.segment_ids, old.index)
    positions, segment_ids, index = _move_slots(*slots, np.int32(by), length=length, mesh=mesh)
    cache = Cache(
        keys=tuple(moved(x, 3) for x in old.keys),
        values=tuple(moved(x, 2) for x in old.values),
        positions=positions,
        segment_ids=segment_ids,
        index=index,
    )
    return rows._replace(cache=cache)


@functools.partial(jax.jit, static_argnames=("axis", "length", "mesh"))
def _move(x: Array, by: Array, *, axis: int, length: int, mesh: Mesh | None) -> Array:
    more = max(length - x.shape[axis], 0)
    x = jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])
    return _placed(jax.lax.slice_in_dim(jnp.roll(x, by, axis), 0, length, axis=axis), mesh)


@functools.partial(jax.jit, static_argnames=("length", "mesh"))
def _move_slots(
    positions: Array, segment_ids: Array, index: Array, by: Array, *, length: int, mesh: Mesh | None
) -> tuple[Array, Array, Array]:
    positions, segment_ids = (
        _move(x, by, axis=1, length=length, mesh=mesh) for x in (positions, segment_ids)
    )
    slot = jnp.arange(length)[None]
    # What was rolled over the end, or lay there unused, holds nothing.
    held = (slot >= by) & (slot < index + by)
    return _placed((positions, jnp.where(held, segment_ids, -1), index + by), mesh)


def _keys(seed: Array, asked: Asked) -> Array:
    """The random key of each row."""
    fold = jax.vmap(jax.random.fold_in)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), asked.question)
    return fold(keys, asked.sample)


def _ended(token: Array, written: Array, asked: Asked, stop_ids: Array) -> Array:
    """Whether each row ends with its last token."""
    return (token[:, None] == stop_ids[None, :]).any(axis=-1) | (written >= asked.limit)


def _placed(rows: Any, mesh: Mesh | None) -> Any:
    """Divided over the mesh in one way, whichever program returns them: none compiles twice."""
    axes = {0: (), 1: ("batch",), 2: ("batch",), 4: ("batch", "kv_heads")}
    return jax.tree.map(lambda leaf: partition.constrain(leaf, mesh, *axes[leaf.ndim]), rows)
