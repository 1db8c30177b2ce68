"""Causal attention within segments, by the kernel that suits the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ranktuner_jax.models import partition

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

__all__ = [
    "IMPLEMENTATIONS",
    "TokenPositions",
    "attend",
    "attend_cached",
    "choose_implementation",
    "platform",
]

IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn")

_SPLASH_BLOCK = 128  # The kernel's rows come in multiples of a TPU's lanes.
_SPLASH_BLOCKS = (
    *("block_q", "block_kv", "block_kv_compute"),
    *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
    *("block_q_dq", "block_kv_dq"),
)


class TokenPositions(NamedTuple):
    """The conversation that each token belongs to, and its position there."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]


def choose_implementation(
    requested: str, *, length: int, dtype: jnp.dtype, mesh: Mesh | None
) -> str:
    """The kernel that runs for rows of `length` tokens on the mesh's devices.

    `auto` takes Pallas splash attention on TPU when `length` is a multiple of 128,
    cuDNN on GPU for 16-bit types, and XLA's own fusion otherwise.

    Raises:
      ValueError: If `requested` is unknown, or splash attention cannot run these rows.

    Example:
      >>> choose_implementation("auto", length=64, dtype=jnp.float32, mesh=None)
      'xla'
    """
    if requested not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be one of {IMPLEMENTATIONS}, got {requested!r}")
    if requested == "splash" and length % _SPLASH_BLOCK:
        raise ValueError(
            f"splash attention needs rows of a multiple of {_SPLASH_BLOCK} tokens, got {length}; "
            "pad the rows or pass attention='auto'"
        )
    if requested != "auto":
        return requested
    kind = platform(mesh)
    if kind == "tpu" and length % _SPLASH_BLOCK == 0:
        return "splash"
    if kind in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2:
        return "cudnn"
    return "xla"


def platform(mesh: Mesh | None) -> str:
    """The platform of the mesh's devices, which this process may only compile for."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def attend(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K d"],
    query_positions: TokenPositions,
    key_positions: TokenPositions,
    *,
    windows: Sequence[int | None] = (None,),
    choice: Int[Array, ""] | None = None,
    scale: float | None = None,
    implementation: str,
    mesh: Mesh | None = None,
) -> Float[Array, "B T H d"]:
    """Each query sees the keys of its own segment, fewer positions back than the window.

    `splash` needs queries and keys to be the same tokens, in the order of their
    positions within each segment; `xla` and `cudnn` go by the positions given.

    Args:
      q: Queries.
      k: Keys; a group of `H / K` heads shares one.
      v: Values.
      query_positions: Of the queries.
      key_positions: Of keys and values.
      windows: The windows that there may be, `None` for one without end.
      choice: Which of them it is; the first if left out.
      scale: What scores are multiplied by; `d**-0.5` if left out.
      implementation: One of `IMPLEMENTATIONS` but `auto`.
      mesh: Where the arrays lie, if they are sharded.

    Returns:
      The mean of the values that each query sees, in the dtype of `v`.

    Example:
      >>> x = jnp.ones((1, 3, 1, 4))
      >>> tokens = TokenPositions(jnp.array([[0, 1, 0]]), jnp.array([[1, 1, 2]]))
      >>> attend(x, x, x, tokens, tokens, windows=(2,), implementation="xla").shape
      (1, 3, 1, 4)
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "splash":
        segments = query_positions.segment_ids
        return _splash(q, k, v, segments, windows, choice, scale, mesh)
    mask = _mask(query_positions, key_positions, windows, choice)
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], scale=scale, implementation="cudnn"
        )
    return _xla(q, k, v, mask, scale)


def attend_cached(
    q: Float[Array, "B T H d"],
    keys: Float[Array, "B K d S"],
    values: Float[Array, "B K S d"],
    query_positions: TokenPositions,
    key_positions: TokenPositions,
    *,
    windows: Sequence[int | None] = (None,),
    choice: Int[Array, ""] | None = None,
    scale: float | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T H d"]:
    """What `attend` does, over keys and values in the order that its products read.

    Keys and values may have more precision than queries (see `Decoder.cache_dtype`): the products
    are then exact in theirs, and sums are float32 anyway. Nothing takes its gradient.

    Example:
      >>> x = jnp.ones((1, 3, 1, 4))
      >>> tokens = TokenPositions(jnp.array([[0, 1, 0]]), jnp.array([[1, 1, 2]]))
      >>> cached = x.transpose(0, 2, 3, 1), x.swapaxes(1, 2)
      >>> attend_cached(x, *cached, tokens, tokens).shape
      (1, 3, 1, 4)
    """
    batch, length, _, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    mask = _mask(query_positions, key_positions, windows, choice)
    grouped = q.reshape(batch, length, keys.shape[1], -1, dim).swapaxes(1, 2)
    # XLA:CPU divides sums of products over more threads than small matrix products.
    product = _sums if length == 1 and platform(mesh) == "cpu" else _matmul
    scores = product(grouped.astype(keys.dtype), keys)
    weights = _softmax(scores, mask, scale).astype(q.dtype).astype(values.dtype)
    mixed = product(weights, values).astype(q.dtype)
    return mixed.transpose(0, 2, 1, 3, 4).reshape(q.shape)


def _matmul(a: Float[Array, "B K T G I"], b: Float[Array, "B K I O"]) -> Float[Array, "B K T G O"]:
    return jnp.einsum("bktgi,bkio->bktgo", a, b, preferred_element_type=jnp.float32)


def _sums(a: Float[Array, "B K T G I"], b: Float[Array, "B K I O"]) -> Float[Array, "B K T G O"]:
    return jnp.sum(a[..., None] * b[:, :, None, None], axis=4, dtype=jnp.float32)


def _mask(
    queries: TokenPositions,
    keys: TokenPositions,
    windows: Sequence[int | None],
    choice: Array | None,
) -> Array:
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    mask = (queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]) & (distance >= 0)
    if choice is not None:
        endless = jnp.iinfo(distance.dtype).max
        sizes = jnp.array([window or endless for window in windows], distance.dtype)
        return mask & (distance < sizes[choice])
    return mask if windows[0] is None else mask & (distance < windows[0])


def _xla(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    batch, length, heads, dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    # Axes in the order that the matmul produces, which saves a transpose of the scores.
    scores = jnp.einsum("btkgd,bskd->bktgs", grouped, k, preferred_element_type=jnp.float32)
    weights = _softmax(scores, mask, scale).astype(v.dtype)
    return jnp.einsum("bktgs,bskd->bktgd", weights, v).transpose(0, 2, 1, 3, 4).reshape(q.shape)


def _softmax(scores: Array, mask: Array, scale: float) -> Array:
    """Of scores [B, K, T, G, S], where the mask [B, T, S] holds."""
    # Finite, for the rows of an empty cache that see nothing.
    lowest = jnp.finfo(jnp.float32).min
    return jax.nn.softmax(jnp.where(mask[:, None, :, None, :], scores * scale, lowest), axis=-1)


def _splash(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    windows: Sequence[int | None],
    choice: Array | None,
    scale: float,
    mesh: Mesh | None,
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def windowed(window: int | None, q: Array, k: Array, v: Array, ids: Any) -> Array:
        heads, length = q.shape[1:3]
        shape = (length, length)
        # The largest block that divides the rows and fits in VMEM.
        block = next(b for b in (512, 256, _SPLASH_BLOCK) if length % b == 0)
        mask = (
            masks.CausalMask(shape)
            if window is None
            else masks.LocalMask(shape, (window - 1, 0), offset=0)
        )
        blocks: dict[str, Any] = dict.fromkeys(_SPLASH_BLOCKS, block)
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=kernels.BlockSizes(**blocks),
        )
        return jax.vmap(kernel)(q, k, v, ids)

    def local(q: Array, k: Array, v: Array, segment_ids: Array, choice: Array | None) -> Array:
        ids = kernels.SegmentIds(q=segment_ids, kv=segment_ids)
        q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, v))
        # A kernel is compiled for its window.
        branches = [functools.partial(windowed, window) for window in windows]
        if choice is None:
            return branches[0](q, k, v, ids).swapaxes(1, 2)
        return jax.lax.switch(choice, branches, q, k, v, ids).swapaxes(1, 2)

    if mesh is None:
        return local(q, k, v, segment_ids, choice)
    # A Pallas call is opaque to the partitioner, so the mesh is divided by hand; heads only
    # where queries and keys divide alike, for a group of heads shares its key.
    spec = functools.partial(partition.spec, mesh)
    kv_spec = spec(("batch", "time", "kv_heads", "head_dim"), k.shape)
    q_spec, whole = kv_spec, PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(q_spec, kv_spec, kv_spec, spec(("batch", "time"), segment_ids.shape), whole),
        out_specs=q_spec,
        check_vma=False,
    )(q, k, v, segment_ids, choice)
