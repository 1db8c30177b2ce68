"""Plans of other settings of the same run: which of them fit, and which is fastest."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ranktuner_jax import files
from ranktuner_jax.models import DecoderConfig
from ranktuner_jax.train.config import TrainConfig, to_dict

__all__ = ["Tried", "candidates", "rank", "try_all"]

# A device's share of a model is divided over at most so many devices that share the rows: beyond
# the devices of a host, tensor parallelism waits for the network.
_MOST_TENSOR = 8


@dataclasses.dataclass(frozen=True)
class Tried:
    """Settings and what became of them.

    Attributes:
      settings: Config keys with their values.
      plan: The plan, as `ranktuner plan --json` prints it; None if there is none.
      reason: Why there is none.
    """

    settings: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    reason: str = ""


def candidates(
    config: TrainConfig, model: DecoderConfig, devices: int, available_gb: float
) -> list[dict[str, Any]]:
    """Settings that are worth compiling, the most promising first.

    Meshes, micro-batches, remat policies and the first moment's dtype. Left out is what cannot
    fit by arithmetic alone: parameters, moments, gradients and, with full remat, the inputs of the
    layers.

    Args:
      config: The run.
      model: Its model.
      devices: The number of devices.
      available_gb: The memory of each.

    Returns:
      Config keys with their values, in the order in which less recomputation, fewer devices for
      the same rows and fewer micro-batches come first: each of them makes a step faster.
    """
    size = config.train.batch_size
    found = []
    for remat, tensor, data, moments in itertools.product(
        ("dots", "full"), (1, 2, 4, 8), (1, 2, 4), ("float32", "bfloat16")
    ):
        if devices % (tensor * data) or tensor > _MOST_TENSOR or model.num_kv_heads % tensor:
            continue
        fsdp = devices // tensor // data
        for accumulation in _divisors(size // (fsdp * data)) if size % (fsdp * data) == 0 else ():
            settings = {
                "mesh.data": data,
                "mesh.fsdp": fsdp,
                "mesh.tensor": tensor,
                "train.accumulation": accumulation,
                "train.remat": remat,
                "optimizer.moment_dtype": moments,
            }
            if _least_gb(config, model, settings) <= available_gb:
                found.append(settings)
    return sorted(
        found,
        key=lambda s: (
            s["optimizer.moment_dtype"] != "float32",
            s["train.remat"] != "dots",
            s["mesh.tensor"],
            s["mesh.data"],
            s["train.accumulation"],
        ),
    )


def _divisors(number: int) -> Iterator[int]:
    return (n for n in range(1, number + 1) if number % n == 0)


def _least_gb(config: TrainConfig, model: DecoderConfig, settings: Mapping[str, Any]) -> float:
    """Memory that the settings need whatever XLA does."""
    width = model.hidden_size
    matrices = width * (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    layer = matrices + 3 * width * model.intermediate_size
    params = model.num_layers * layer + model.vocab_size * width * (2 - model.tie_embeddings)
    moments = 4 + (4 if settings["optimizer.moment_dtype"] == "float32" else 2)
    shards = settings["mesh.fsdp"] * settings["mesh.tensor"]
    rows = config.train.batch_size // settings["train.accumulation"]
    rows //= settings["mesh.data"] * settings["mesh.fsdp"]
    tokens = rows * config.data.row_length
    # With "dots" a layer keeps its projections too.
    kept = width if settings["train.remat"] == "full" else width + layer // width // 2
    return (params * (4 + 4 + moments) / shards + 2.0 * model.num_layers * tokens * kept) / 1e9


def try_all(
    settings: Sequence[Mapping[str, Any]],
    config: TrainConfig,
    command: Sequence[str],
    limit: int,
    report: Callable[[int, Tried], None],
) -> list[Tried]:
    """Plans each of the settings in a process of its own, and keeps the plans in the cache.

    A compiler that runs out of memory, or crashes, ends its own process only. Left out are settings
    that differ only by more micro-batches from some that fit.

    Args:
      settings: As `candidates` returns them.
      config: The run.
      command: Arguments of `ranktuner` that plan the run as JSON.
      limit: How many to plan at most.
      report: Called with the number of those that are done, and the last.
    """
    done: list[Tried] = []
    for chosen in settings:
        if len(done) < limit and not any(_is_faster(one, chosen) for one in done):
            done.append(_try(chosen, config, command))
            report(len(done), done[-1])
    return done


def _is_faster(tried: Tried, chosen: Mapping[str, Any]) -> bool:
    """Whether something fits that differs from the settings only by fewer micro-batches."""
    same = {**chosen, "train.accumulation": tried.settings["train.accumulation"]}
    return bool(tried.plan and tried.plan["fits"] and same == tried.settings)


def _try(settings: Mapping[str, Any], config: TrainConfig, command: Sequence[str]) -> Tried:
    full = [*command, *(f"--config.{key}={value}" for key, value in settings.items())]
    key = json.dumps([full, to_dict(config), _versions()], sort_keys=True)
    path = files.cache_dir() / "plans" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if path.is_file():
        return Tried(settings, json.loads(path.read_text(encoding="utf-8")))
    done = subprocess.run(
        [sys.executable, "-m", "ranktuner_jax.cli", *full],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 3):
        lines = done.stderr.strip().splitlines()
        return Tried(settings, None, lines[-1] if lines else f"exit code {done.returncode}")
    plan = json.loads(done.stdout)
    if "memory_gb" not in plan:
        return Tried(settings, None, plan["reason"])
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, done.stdout)
    return Tried(settings, plan)


def _versions() -> dict[str, str]:
    """Those of what compiles the programs and reads them."""
    found = {}
    for name in ("jax", "jaxlib", "jax-cuda12-plugin", "libtpu", "ranktuner-jax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def rank(tried: Sequence[Tried]) -> list[Tried]:
    """Those that fit, the fastest first; then those that do not, by what they lack.

    Example:
      >>> def plan(fits, total, low):
      ...     memory = {"total": total}
      ...     return {"fits": fits, "memory_gb": memory, "step_seconds": [low, 2 * low]}
      >>> three = [plan(False, 40.0, 1.0), plan(True, 9.0, 3.0), plan(True, 14.0, 2.0)]
      >>> [one.plan["memory_gb"]["total"] for one in rank([Tried({}, one) for one in three])]
      [14.0, 9.0, 40.0]
    """

    def key(one: Tried) -> tuple[int, float]:
        if one.plan is None:
            return 2, 0.0
        if one.plan["fits"]:
            return 0, one.plan["step_seconds"][0]
        return 1, one.plan["memory_gb"]["total"]

    return sorted(tried, key=key)
