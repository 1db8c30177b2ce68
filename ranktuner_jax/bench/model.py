"""Measure the decoder: forward and backward pass, compared with transformers + torch, and loading.

ranktuner bench model --batch_size=16 --length=64
ranktuner bench model --loading=1000
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from ranktuner_jax import models
from ranktuner_jax.bench.records import Record, add_json, show
from ranktuner_jax.models.hf import tensor_names
from ranktuner_jax.train.commands import flags

__all__ = ["Measurement", "add_arguments", "measure", "measure_loading", "run"]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One forward and backward pass of the decoder, without the unembedding.

    Attributes:
      name: Library, dtype and remat policy.
      seconds: Time of the fastest repeat.
      dtype: Of the matrix products.
      temp_bytes: Memory that XLA needs besides parameters and gradients; None for torch.
    """

    name: str
    seconds: float
    dtype: str
    temp_bytes: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner bench model`."""
    flags.add_config(parser, default="smollm2_chain_sum", groups=("model",))
    parser.add_argument("--batch_size", type=int, default=16, help="rows per batch [%(default)s]")
    parser.add_argument("--length", type=int, default=64, help="tokens per row [%(default)s]")
    parser.add_argument("--repeats", type=int, default=3, help="runs; fastest counts [%(default)s]")
    parser.add_argument(
        "--loading",
        type=int,
        metavar="MB",
        help="instead, measure the host memory needed to load a random checkpoint of MB megabytes",
    )
    add_json(parser)


def measure(
    model: str, *, batch_size: int, length: int, repeats: int, dtype: str, remat: str
) -> Measurement:
    """Times value and gradient of a linear function of the hidden states."""
    tokens, cotangent = _batch(models.resolve(model), batch_size, length)
    decoder = models.load_pretrained(model, dtype=dtype, remat=remat)
    graph, params = nnx.split(decoder, nnx.Param)

    def objective(params: nnx.State) -> jax.Array:
        return jnp.sum(
            nnx.merge(graph, params)(jnp.asarray(tokens)).astype(jnp.float32) * cotangent
        )

    step = jax.jit(jax.value_and_grad(objective)).lower(params).compile()
    seconds = _fastest(lambda: jax.block_until_ready(step(params)), repeats)
    memory = step.memory_analysis()
    temp = None if memory is None else memory.temp_size_in_bytes
    return Measurement(f"ranktuner_jax, {dtype}, remat {remat}", seconds, dtype, temp)


def _measure_torch(model: str, *, batch_size: int, length: int, repeats: int) -> Measurement:
    import torch
    import transformers

    folder = models.resolve(model)
    tokens, cotangent = map(torch.tensor, _batch(folder, batch_size, length))
    decoder = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)

    def step() -> None:
        decoder.zero_grad()
        hidden = decoder(tokens.long(), use_cache=False).last_hidden_state
        (hidden * cotangent).sum().backward()

    return Measurement("transformers + torch, float32", _fastest(step, repeats), "float32")


def _batch(folder: pathlib.Path, batch_size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    config = models.read_config(folder)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (batch_size, length)).astype(np.int32)
    return tokens, rng.normal(size=(*tokens.shape, config.hidden_size)).astype(np.float32)


def _fastest(step: Callable[[], Any], repeats: int) -> float:
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_loading(megabytes: int) -> tuple[float, float, float]:
    """Measures the anonymous host memory of `load_pretrained`, in MB, over all local devices.

    Returns:
      The memory of the loaded model, the peak during loading, and the most by which the peak
      may exceed the model: one shard of the largest stacked parameter and one tensor.
    """
    layer = 512 * 512 * 4 + 512 * 2048 * 3
    config = models.DecoderConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=2048,
        num_layers=max(1, round(megabytes * 1e6 / (2 * layer))),
        num_heads=8,
        num_kv_heads=8,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        config.to_hf().save_pretrained(folder)
        _write_random(config, folder / "model.safetensors")
        devices = jax.devices()
        mesh = jax.make_mesh((len(devices),), ("fsdp",), axis_types=(AxisType.Auto,))
        jax.block_until_ready(jax.device_put(np.zeros(8), devices[-1]))
        before = _anonymous_bytes()
        with _peak_bytes() as peak:
            model = models.load_pretrained(folder, mesh=mesh, param_dtype=jnp.bfloat16)
        kept = _anonymous_bytes() - before
    shard = max(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param))
    )
    tensor = max(2 * math.prod(shape) for _, _, shape in tensor_names(config).values())
    return kept / 1e6, (peak[0] - before) / 1e6, (shard + tensor) / 1e6


def _write_random(config: models.DecoderConfig, file: pathlib.Path) -> None:
    # By hand, one tensor at a time: the reader would reuse memory that a library had allocated and
    # freed for writing, which would hide its own allocations.
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, (_, _, shape) in tensor_names(config).items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (offset, offset + size)}
        offset += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for entry in header.values():
            out.write(rng.bytes(2 * math.prod(entry["shape"])))


def _anonymous_bytes() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith("RssAnon")).split()[1])


@contextlib.contextmanager
def _peak_bytes() -> Iterator[list[int]]:
    peak, done = [_anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], _anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def run(args: argparse.Namespace) -> int:
    """Prints the measurements."""
    if args.loading:
        kept, peak, bound = measure_loading(args.loading)
        figures = {"kept": kept, "peak": peak, "besides the model": peak - kept, "allowed": bound}
        case = f"a checkpoint of {args.loading} MB"
        sizes = {f"{name}_bytes": megabytes * 1e6 for name, megabytes in figures.items()}
        show([Record("model", "host memory of loading", case, sizes)], as_json=args.json)
        return 0
    model = flags.read_config(args).model
    size = {"batch_size": args.batch_size, "length": args.length, "repeats": args.repeats}
    measurements = []
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed (extra `parity`): no comparison", file=sys.stderr)
    else:
        measurements.append(_measure_torch(model, **size))
    for dtype in ("float32", "bfloat16"):
        for remat in models.REMAT_POLICIES:
            measurements.append(measure(model, **size, dtype=dtype, remat=remat))
    setting = f"forward and backward, {args.batch_size} rows of {args.length} tokens"
    first = measurements[0]
    records = (
        Record(
            "model",
            setting,
            each.name,
            {
                "fastest_s": each.seconds,
                f"÷ {first.name}": each.seconds / first.seconds,
                "temp_bytes": each.temp_bytes,
            },
            each.dtype,
        )
        for each in measurements
    )
    show(records, as_json=args.json)
    return 0
