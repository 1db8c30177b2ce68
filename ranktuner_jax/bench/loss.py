"""`ranktuner bench loss`: time and memory of the losses."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ranktuner_jax import losses
from ranktuner_jax.errors import UserError
from ranktuner_jax.losses import chunk
from ranktuner_jax.losses.inputs import Operands
from ranktuner_jax.losses.projection import Projection

# SmolLM2-135M, Qwen3-0.6B, Gemma 3 270M.
SHAPES = ("2048,576,49152", "1024,1024,151936", "512,640,262144")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner bench loss`."""
    parser.description = (
        "Measure the losses: the time of value and both gradients in float32, compared with the\n"
        "matrix products alone, and XLA's temporary memory. The repeats of all rows are\n"
        "interleaved: compare rows of a table, not runs. torch rows need the extra `parity`."
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="N,D,V",
        help=f"tokens, hidden size, vocabulary size; repeatable [{' '.join(SHAPES)}]",
    )
    parser.add_argument(
        "--supervised",
        type=float,
        nargs="+",
        default=[1.0, 0.5],
        metavar="FRACTION",
        help="fractions of positions that are supervised [1.0 0.5]",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per row [%(default)s]")
    parser.add_argument("--chunk-size", type=int, help="tokens per chunk, fused losses [by shape]")
    parser.add_argument(
        "--compile-for",
        metavar="TOPOLOGY",
        help="instead of measuring, compile for one chip of a TPU topology such as v5e:2x2, in "
        "bfloat16, and print XLA's estimates of time and memory; needs libtpu, but no TPU",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its tables."""
    from rich.console import Console

    console = Console(highlight=False)
    shapes = [_parse_shape(shape) for shape in args.shape or SHAPES]
    if args.compile_for:
        console.print(_compiled_table(args.compile_for, shapes, args.chunk_size))
        return 0
    for size, features, vocab in shapes:
        rows = _measure(size, features, vocab, args)
        console.print(_table(f"N {size}, D {features}, V {vocab}", rows, args.supervised))
    return 0


def _parse_shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise UserError(f"--shape: expected N,D,V such as {SHAPES[0]}, got {text!r}")
    size, features, vocab = (int(part) for part in parts)
    return size, features, vocab


@dataclasses.dataclass
class _Row:
    """One loss: how to run it for each fraction of supervised positions."""

    name: str
    calls: dict[float, Callable[[], Any]]
    temp_bytes: int | None
    seconds: dict[float, list[float]] = dataclasses.field(default_factory=dict)

    def median(self, share: float) -> float:
        return statistics.median(self.seconds[share])


def _measure(size: int, features: int, vocab: int, args: argparse.Namespace) -> list[_Row]:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((size, features), np.float32)
    unembed = rng.standard_normal((vocab, features), np.float32) / np.float32(features**0.5)
    labels = rng.integers(0, vocab, size, np.int32)
    # Supervised positions are spread evenly, like prompts and completions.
    masks = {
        share: np.floor(np.arange(1, size + 1) * share) > np.floor(np.arange(size) * share)
        for share in args.supervised
    }
    rows = [
        _jax_row(name, function, (hidden, unembed, labels), masks)
        for name, function in _jax_cases(args.chunk_size).items()
    ]
    rows += _torch_rows((hidden, unembed, labels), masks)
    for row in rows:  # Warm up: the first runs allocate memory.
        for call in row.calls.values():
            call()
    for _ in range(args.repeats):
        for row in rows:
            for share, call in row.calls.items():
                start = time.perf_counter()
                call()
                row.seconds.setdefault(share, []).append(time.perf_counter() - start)
    return rows


def _jax_cases(chunk_size: int | None) -> dict[str, Callable[..., Any]]:
    """Functions of (hidden, unembed, labels, mask) that return a value and both gradients."""

    def graded(loss: Callable[..., Any]) -> Callable[..., Any]:
        return jax.value_and_grad(loss, argnums=(0, 1))

    def fused(weighting: losses.Weighting) -> Callable[..., Any]:
        def loss(hidden: Any, unembed: Any, labels: Any, mask: Any) -> tuple[Any, Any]:
            output = losses.fused_weighted_nll(
                hidden, unembed, labels, mask, weighting=weighting, chunk_size=chunk_size
            )
            return output.mean(), output.metrics

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    def fused_nll(hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
        # Without the metrics, XLA removes all statistics but the NLL.
        return losses.fused_weighted_nll(
            hidden, unembed, labels, mask, weighting=losses.SFT(), chunk_size=chunk_size
        ).mean()

    def dense_nll(hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
        logits = hidden @ unembed.T
        label_logits = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=1) - label_logits
        return jnp.sum(jnp.where(mask, nll, 0)) / jnp.sum(mask)

    def dense(hidden: Any, unembed: Any, labels: Any, mask: Any) -> tuple[Any, Any]:
        output = losses.weighted_nll(hidden @ unembed.T, labels, mask)
        return output.mean(), output.metrics

    cases: dict[str, Callable[..., Any]] = {
        "three matmuls, unchunked": _matmuls,
        "three matmuls, chunked": functools.partial(_matmuls_in_chunks, 512),
        "dense CE": graded(dense_nll),
        "fused CE": graded(fused_nll),
        "dense RankTuner": jax.value_and_grad(dense, argnums=(0, 1), has_aux=True),
        "fused RankTuner": fused(losses.RankTuner()),
        "fused RankTuner, exact": fused(losses.RankTuner(scale="exact")),
    }
    try:
        import optax
    except ImportError:
        return cases

    def optax_loss(hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
        nll = optax.softmax_cross_entropy_with_integer_labels(hidden @ unembed.T, labels)
        return jnp.sum(jnp.where(mask, nll, 0)) / jnp.sum(mask)

    return {**cases, "optax CE": graded(optax_loss)}


def _matmuls(hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
    """The lower bound: the matrix products that any loss and its two gradients need."""
    logits = hidden @ unembed.T
    return logits @ unembed, logits.T @ hidden


def _matmuls_in_chunks(chunk: int, hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
    chunk = min(chunk, len(hidden))

    def step(index: Any, carry: Any) -> Any:
        d_hidden, d_unembed = carry
        part = lax.dynamic_slice_in_dim(hidden, index * chunk, chunk)
        one_d_hidden, one_d_unembed = _matmuls(part, unembed, labels, mask)
        d_hidden = lax.dynamic_update_slice_in_dim(d_hidden, one_d_hidden, index * chunk, 0)
        return d_hidden, d_unembed + one_d_unembed

    zeros = jnp.zeros_like(hidden), jnp.zeros_like(unembed)
    return lax.fori_loop(0, len(hidden) // chunk, step, zeros)


def _jax_row(
    name: str,
    function: Callable[..., Any],
    inputs: tuple[np.ndarray, ...],
    masks: dict[float, np.ndarray],
) -> _Row:
    arrays = [jnp.asarray(x) for x in inputs]
    on_device = {share: jnp.asarray(mask) for share, mask in masks.items()}
    compiled = jax.jit(function).lower(*arrays, next(iter(on_device.values()))).compile()
    analysis = compiled.memory_analysis()
    return _Row(
        name,
        {
            share: functools.partial(lambda m: jax.block_until_ready(compiled(*arrays, m)), mask)
            for share, mask in on_device.items()
        },
        None if analysis is None else analysis.temp_size_in_bytes,
    )


def _torch_rows(inputs: tuple[np.ndarray, ...], masks: dict[float, np.ndarray]) -> list[_Row]:
    """The paper's loss in eager torch, filtering positions after or before the projection."""
    try:
        import torch
    except ImportError:
        return []
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    hidden, unembed = (torch.from_numpy(x).requires_grad_() for x in inputs[:2])
    labels = torch.from_numpy(inputs[2]).long()

    def step(mask: Any, filter_first: bool) -> None:
        hidden.grad = unembed.grad = None
        kept = hidden[mask] if filter_first else hidden
        logits = kept @ unembed.T
        logits = logits if filter_first else logits[mask]
        torch_ranktuner(torch, logits, labels[mask]).backward()

    return [
        _Row(
            f"torch RankTuner, {name}",
            {
                share: functools.partial(step, torch.from_numpy(mask), filter_first)
                for share, mask in masks.items()
            },
            None,
        )
        for name, filter_first in (("logits filtered", False), ("hidden filtered", True))
    ]


def torch_ranktuner(torch: Any, logits: Any, labels: Any, base: str = "prob") -> Any:
    """The paper's loss, as in its authors' code."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    nll = -log_probs.gather(1, labels[:, None])[:, 0]
    with torch.no_grad():
        probs = log_probs.exp()
        bits = -(probs * log_probs).sum(-1) / np.log(2)
        bound = torch.where(bits >= 2, 0.25 * 2**bits + 1, 2 - probs.max(-1).values)
        rank = (logits >= logits.gather(1, labels[:, None])).sum(-1)
        exponent = 1 / torch.log2(torch.maximum(bound, rank) + 1) ** 2
        prob = torch.exp(-nll)
        weights = torch.clamp(prob * bound, min=1e-6) ** -exponent
        weights = prob * weights if base == "prob" else weights
    return (weights * nll).sum() / len(nll)


def _compiled_table(
    topology: str, shapes: list[tuple[int, int, int]], chunk_size: int | None
) -> Any:
    """XLA's estimates for one chip: bfloat16 inputs, float32 accumulation."""
    from jax.experimental import topologies
    from rich.table import Table

    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        device: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[
            0
        ]
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--compile-for: expected a TPU topology such as v5e:2x2 and libtpu installed (pip "
            f"install 'jax[tpu]'), got {topology!r}: {str(error).splitlines()[0]}"
        ) from None
    table = Table(title=f"compiled for {device.device_kind}, bfloat16: XLA's estimate")
    table.add_column("value and both gradients")
    for column in ("time", "÷ dense CE", "temp HBM", "÷ dense CE"):
        table.add_column(column, justify="right")
    cases = _jax_cases(chunk_size)
    for size, features, vocab in shapes:
        compiler = _Compiler(jax.sharding.SingleDeviceSharding(device))
        inputs = compiler.inputs(size, features, vocab)
        base_seconds, base_bytes = compiler.cost(_dense_nll_of_bfloat16, *inputs)
        seconds, memory = compiler.cost(cases["fused RankTuner"], *inputs)
        # XLA counts the body of each loop once. The main loop runs once per chunk, the loop over
        # the remainder not at all.
        main = chunk_size or losses.default_chunk_size(size, features, vocab)
        body = compiler.chunk_seconds(main, features, vocab)
        seconds += (size / main - 1) * body - compiler.chunk_seconds(main // 4, features, vocab)
        title = f"N {size}, D {features}, V {vocab}"
        table.add_row(
            f"dense CE, {title}", f"{base_seconds * 1e3:.1f} ms", "1.00", _gb(base_bytes), "1.00"
        )
        ratios = f"{seconds / base_seconds:.2f}", f"{memory / base_bytes:.2f}"
        table.add_row(
            "fused RankTuner", f"{seconds * 1e3:.1f} ms", ratios[0], _gb(memory), ratios[1]
        )
    return table


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _dense_nll_of_bfloat16(hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
    def loss(hidden: Any, unembed: Any) -> Any:
        logits = chunk.dot(hidden, unembed, (1, 1), jnp.float32)
        label_logits = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=1) - label_logits
        return jnp.sum(jnp.where(mask, nll, 0)) / jnp.sum(mask)

    return jax.value_and_grad(loss, argnums=(0, 1))(hidden, unembed)


@dataclasses.dataclass(frozen=True)
class _Compiler:
    """Compiles for a device that may not be attached."""

    sharding: jax.sharding.Sharding

    def array(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding)

    def inputs(self, size: int, features: int, vocab: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (
            self.array(jnp.bfloat16, size, features),
            self.array(jnp.bfloat16, vocab, features),
            self.array(jnp.int32, size),
            self.array(jnp.bool_, size),
        )

    def cost(self, function: Any, *inputs: Any, donate: tuple[int, ...] = ()) -> tuple[float, int]:
        compiled = jax.jit(function, donate_argnums=donate).lower(*inputs).compile()
        costs: Any = compiled.cost_analysis()
        memory: Any = compiled.memory_analysis()
        return costs["optimal_seconds"], memory.temp_size_in_bytes

    def chunk_seconds(self, size: int, features: int, vocab: int) -> float:
        """Estimated seconds of one chunk of the fused RankTuner: the body of its loop."""
        projection = Projection(vocab, vocab)

        def body(hidden: Any, unembed: Any, labels: Any, scratch: Any, d_unembed: Any) -> Any:
            operands = Operands(hidden, unembed, None)
            logits = chunk.chunk_logits(operands, projection, scratch)
            stats, softmax = chunk.chunk_stats(logits, labels, projection, ())
            weights = losses.RankTuner()(stats)
            gradients = chunk.chunk_gradients(
                logits, softmax, weights, labels, operands, projection, d_unembed, None
            )
            return stats, gradients, logits

        hidden, unembed, labels, _ = self.inputs(size, features, vocab)
        scratch = self.array(jnp.float32, projection.num_tiles, size, projection.tile)
        d_unembed = self.array(jnp.float32, vocab, features)
        inputs = hidden, unembed, labels, scratch, d_unembed
        return self.cost(body, *inputs, donate=(3, 4))[0]


def _table(title: str, rows: list[_Row], shares: list[float]) -> Any:
    from rich.table import Table

    table = Table(
        title=f"{title} · float32 · {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    )
    table.add_column("value and both gradients")
    for share in shares:
        table.add_column(f"{share:.0%} supervised", justify="right")
        table.add_column("÷ matmuls", justify="right")
    table.add_column("temp memory", justify="right")
    # The matmuls compute every position, whatever the mask: all of their runs count.
    matmuls = min(
        statistics.median([s for share in shares for s in row.seconds[share]])
        for row in rows
        if row.name.startswith("three matmuls")
    )
    for row in rows:
        cells = [row.name]
        for share in shares:
            cells += [f"{row.median(share):.3f} s", f"{row.median(share) / matmuls:.2f}"]
        memory = "" if row.temp_bytes is None else f"{row.temp_bytes / 1e6:.0f} MB"
        table.add_row(*cells, memory)
    return table
