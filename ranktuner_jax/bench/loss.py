"""`ranktuner bench loss`: time and memory of the losses."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ranktuner_jax import losses
from ranktuner_jax.bench.records import Record, add_json, show
from ranktuner_jax.bench.row import (
    Row,
    random_inputs,
    setting,
    supervise,
    time_rows,
    useful_flops,
)
from ranktuner_jax.bench.torch_losses import EAGER, torch_row
from ranktuner_jax.errors import UserError
from ranktuner_jax.losses.chunk import dot

__all__ = ["add_arguments", "jax_cases", "jax_row", "run"]

# As below adapters: the gradient of the hidden states alone takes two products, not three.
FROZEN_HEAD = "fused RankTuner, frozen head"

# SmolLM2-135M, Qwen3-0.6B, Gemma 3 270M.
SHAPES = ("2048,576,49152", "1024,1024,151936", "512,640,262144")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner bench loss`."""
    parser.description = (
        "Measure the losses: the time of value and both gradients, compared with the matrix\n"
        "products alone, and XLA's temporary memory. The repeats of all rows are interleaved:\n"
        "compare rows of a table, not runs. torch rows need the extra `parity`."
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
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="[%(default)s]"
    )
    parser.add_argument(
        "--compile-for",
        metavar="TOPOLOGY",
        help="instead of measuring, compile for one chip of a TPU topology such as v5e:2x2, in "
        "bfloat16, and print XLA's own estimates of clock cycles and memory; needs libtpu, but no "
        "TPU",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its tables."""
    shapes = [_parse_shape(shape) for shape in args.shape or SHAPES]
    if args.compile_for:
        device = _described_device(args.compile_for)
        records = _compiled_records(device, shapes, args.chunk_size)
        # What runs nothing has no measured peak.
        machine = {"name": device.device_kind, "devices": 1, "cores": 0, "jax": jax.__version__}
        show(records, as_json=args.json, machine={**machine, "peak_flops": {}})
        return 0
    show((record for shape in shapes for record in _measure(shape, args)), as_json=args.json)
    return 0


def _parse_shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise UserError(f"--shape: expected N,D,V such as {SHAPES[0]}, got {text!r}")
    size, features, vocab = (int(part) for part in parts)
    return size, features, vocab


def _measure(shape: tuple[int, int, int], args: argparse.Namespace) -> Iterator[Record]:
    inputs = random_inputs(*shape)
    masks = {share: supervise(len(inputs[0]), share) for share in args.supervised}
    rows = [
        jax_row(name, function, inputs, masks, args.dtype)
        for name, function in jax_cases(args.chunk_size).items()
    ]
    if importlib.util.find_spec("torch") is not None:
        rows += [torch_row(*case, inputs, masks, args.dtype) for case in EAGER.items()]
    time_rows(rows, args.repeats)
    # The matmuls compute every position, whatever the mask: all of their runs count.
    matmuls = min(
        statistics.median([s for share in masks for s in row.seconds[share]])
        for row in rows
        if row.name.startswith("three matmuls")
    )
    for row in rows:
        figures: dict[str, float | None] = {}
        for share in masks:
            figures[f"{share:.0%} supervised_s"] = row.median(share)
            figures[f"÷ matmuls, {share:.0%}"] = row.median(share) / matmuls
        figures |= {"temp_bytes": row.temp_bytes, "peak_bytes": row.peak_bytes}
        if 1.0 in masks:
            products = 2 if row.name == FROZEN_HEAD else 3
            figures["flops_per_s"] = products / 3 * useful_flops(*shape) / row.median(1.0)
        yield Record("loss", setting(shape, args.dtype), row.name, figures, args.dtype)


def jax_cases(chunk_size: int | None) -> dict[str, Callable[..., Any]]:
    """Functions of (hidden, unembed, labels, mask) that return a value and both gradients.

    That of a frozen head returns the gradient of the hidden states alone.
    """

    def graded(loss: Callable[..., Any]) -> Callable[..., Any]:
        return jax.value_and_grad(loss, argnums=(0, 1))

    def fused(
        weighting: losses.Weighting, argnums: int | tuple[int, int] = (0, 1)
    ) -> Callable[..., Any]:
        def loss(hidden: Any, unembed: Any, labels: Any, mask: Any) -> tuple[Any, Any]:
            output = losses.fused_weighted_nll(
                hidden, unembed, labels, mask, weighting=weighting, chunk_size=chunk_size
            )
            return output.mean(), output.metrics

        return jax.value_and_grad(loss, argnums=argnums, has_aux=True)

    def fused_nll(hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
        # Without the metrics, XLA removes all statistics but the NLL.
        return losses.fused_weighted_nll(
            hidden, unembed, labels, mask, weighting=losses.SFT(), chunk_size=chunk_size
        ).mean()

    def dense_nll(hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
        logits = _logits(hidden, unembed)
        label_logits = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=1) - label_logits
        return jnp.sum(jnp.where(mask, nll, 0)) / jnp.sum(mask)

    def dense(hidden: Any, unembed: Any, labels: Any, mask: Any) -> tuple[Any, Any]:
        output = losses.weighted_nll(_logits(hidden, unembed), labels, mask)
        return output.mean(), output.metrics

    cases: dict[str, Callable[..., Any]] = {
        "three matmuls, unchunked": _matmuls,
        "three matmuls, chunked": functools.partial(_matmuls_in_chunks, 512),
        "dense CE": graded(dense_nll),
        "fused CE": graded(fused_nll),
        "dense RankTuner": jax.value_and_grad(dense, argnums=(0, 1), has_aux=True),
        "fused RankTuner": fused(losses.RankTuner()),
        "fused RankTuner, exact": fused(losses.RankTuner(scale="exact")),
        FROZEN_HEAD: fused(losses.RankTuner(), argnums=0),
    }
    try:
        import optax
    except ImportError:
        return cases

    def optax_loss(hidden: Any, unembed: Any, labels: Any, mask: Any) -> Any:
        nll = optax.softmax_cross_entropy_with_integer_labels(_logits(hidden, unembed), labels)
        return jnp.sum(jnp.where(mask, nll, 0)) / jnp.sum(mask)

    return {**cases, "optax CE": graded(optax_loss)}


def _logits(hidden: Any, unembed: Any) -> Any:
    """In float32, whatever the inputs are."""
    return dot(hidden, unembed, (1, 1), jnp.float32)


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


def jax_row(
    name: str,
    function: Callable[..., Any],
    inputs: tuple[np.ndarray, ...],
    masks: Mapping[float, np.ndarray],
    dtype: str,
) -> Row:
    """Compiles a loss of `jax_cases`.

    Args:
      name: The loss.
      function: The loss.
      inputs: As `random_inputs` returns them.
      masks: The supervised positions, by their fraction.
      dtype: What hidden states and unembedding are cast to.
    """
    hidden, unembed, labels = inputs
    arrays = jnp.asarray(hidden, dtype), jnp.asarray(unembed, dtype), jnp.asarray(labels)
    on_device = {share: jnp.asarray(mask) for share, mask in masks.items()}
    compiled = jax.jit(function).lower(*arrays, next(iter(on_device.values()))).compile()
    calls = {
        share: functools.partial(lambda m: jax.block_until_ready(compiled(*arrays, m)), mask)
        for share, mask in on_device.items()
    }
    memory = compiled.memory_analysis()
    if memory is None:
        return Row(name, calls)
    temporary = memory.temp_size_in_bytes
    return Row(name, calls, temporary, temporary + memory.output_size_in_bytes)


def _described_device(topology: str) -> Any:
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--compile-for: expected a TPU topology such as v5e:2x2 and libtpu installed (pip "
            f"install 'jax[tpu]'), got {topology!r}: {str(error).splitlines()[0]}"
        ) from None


def _compiled_records(
    device: Any, shapes: Iterable[tuple[int, int, int]], chunk_size: int | None
) -> Iterator[Record]:
    """XLA's estimates for one chip: bfloat16 inputs, float32 accumulation."""
    from ranktuner_jax.plan.hlo import Program
    from ranktuner_jax.plan.program import chunk_trips

    sharding = jax.sharding.SingleDeviceSharding(device)
    cases = jax_cases(chunk_size)

    def cost(case: str, shape: tuple[int, int, int]) -> tuple[int, int]:
        size, features, vocab = shape
        arrays = (
            (jnp.bfloat16, size, features),
            (jnp.bfloat16, vocab, features),
            (jnp.int32, size),
            (jnp.bool_, size),
        )
        inputs = (jax.ShapeDtypeStruct(s, dtype, sharding=sharding) for dtype, *s in arrays)
        compiled = jax.jit(cases[case]).lower(*inputs).compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert text is not None
        assert memory is not None
        cycles = Program(text, chunk_trips(text, size)).cycles
        if not cycles:
            raise UserError(
                "--compile-for: expected a program in which XLA notes clock cycles, as with the "
                f"libtpu of jax {jax.__version__} (pip install 'jax[tpu]'), got one without"
            )
        return cycles, memory.temp_size_in_bytes

    for shape in shapes:
        title = f"{setting(shape, 'bfloat16')}, compiled, XLA's estimate"
        base = cost("dense CE", shape)
        for name in ("dense CE", "fused CE", "fused RankTuner"):
            cycles, temporary = base if name == "dense CE" else cost(name, shape)
            figures = {
                "million cycles": cycles / 1e6,
                "÷ dense CE, time": cycles / base[0],
                "temp_bytes": temporary,
                "÷ dense CE, memory": temporary / base[1],
            }
            yield Record("loss", title, name, figures, "bfloat16")
