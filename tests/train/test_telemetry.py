"""What a run logs, what logging costs, and that one compiled program runs all steps."""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ranktuner_jax import models
from ranktuner_jax.errors import UserError
from ranktuner_jax.train import Hook, TrainConfig, Trainer, train_and_evaluate
from ranktuner_jax.train.telemetry.utilisation import Utilisation, peak_flops, step_flops

MakeConfig = Callable[..., TrainConfig]

TINY = models.DecoderConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=192,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    tie_embeddings=False,
)


def lines_of(workdir: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_step_flops_agree_with_the_count_of_xla() -> None:
    rows, length = 4, 16
    graph, params = nnx.split(models.Decoder(TINY, rngs=nnx.Rngs(0)), nnx.Param)

    def loss(params: nnx.State, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        return jnp.sum(model.logits(model(tokens)) ** 2)

    tokens = jnp.zeros((rows, length), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile()
    count = rows * length
    # XLA computes both triangles of the attention, and counts more than matrix products.
    ours = step_flops(TINY, tokens=count, supervised=count, seen=count * length)
    cost = compiled.cost_analysis()
    assert cost is not None
    assert 0.8 < ours / cost["flops"] < 1.02


def test_an_unsupervised_token_adds_no_flops_of_the_unembedding() -> None:
    none, one = (step_flops(TINY, tokens=8, supervised=n, seen=8) for n in (0, 1))
    assert one - none == 6 * 64 * 512


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU v6", None),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA L400", None),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_flops_are_known_by_device_kind(kind: str, teraflops: float | None) -> None:
    peak = peak_flops(kind)
    assert peak == (None if teraflops is None else teraflops * 1e12)


class Device:
    device_kind = "NVIDIA H100 80GB HBM3"

    def __init__(self, peak: int) -> None:
        self.peak = peak

    def memory_stats(self) -> dict[str, int]:
        return {"peak_bytes_in_use": self.peak}


def test_a_known_device_has_utilisation_and_memory_metrics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices: Any = [Device(3 * 10**9), Device(5 * 10**9)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    numbers = Utilisation(TINY, devices).metrics(tokens=1e6, supervised=5e5, seen=1e8, seconds=2.0)
    per_device = step_flops(TINY, tokens=1e6, supervised=5e5, seen=1e8) / 2 / 2
    assert numbers["mfu"] == pytest.approx(per_device / 989e12)
    assert numbers["tflops_per_device"] == pytest.approx(per_device / 1e12)
    assert numbers["memory/device_peak_gb"] == 5.0


def test_an_unknown_device_has_neither() -> None:
    numbers = Utilisation(TINY, jax.devices()).metrics(tokens=9, supervised=9, seen=9, seconds=1.0)
    assert numbers.keys() == {"tflops_per_device", "memory/host_peak_gb"}
    assert 0.05 < numbers["memory/host_peak_gb"] < 1000


class Watched:
    """A run: its compilations, and the order of its steps and of the reads of its arrays."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.compiled: list[str] = []
        self.workdir = pathlib.Path()


@pytest.fixture(scope="module")
def watched(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    run = Watched()
    run.workdir = tmp_path_factory.mktemp("watched")

    class Watch(Hook):
        def before_step(self, trainer: Trainer, step: int) -> None:
            run.events.append("step")

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Finished XLA compilation"):
                run.compiled.append(record.getMessage())

    array = type(jnp.zeros(1))
    value = vars(array)["_value"]

    def read(self: Any) -> np.ndarray:
        run.events.append("read")
        return value.fget(self)

    handler, logger = Handler(), logging.getLogger("jax._src.dispatch")
    with pytest.MonkeyPatch.context() as patch, jax.log_compiles():
        logger.addHandler(handler)
        patch.setattr(array, "_value", property(read))
        config = tiny_config(checkpoint__every_steps=0, eval__task="")
        train_and_evaluate(config, run.workdir, hooks=[Watch(at_end=False)])
        logger.removeHandler(handler)
    return run


def test_one_compiled_program_runs_all_steps(watched: Watched) -> None:
    assert watched.compiled  # Compilations are recorded.
    assert sum("train_step" in message for message in watched.compiled) == 1
    assert watched.events.count("step") == 6


def test_the_host_reads_only_the_metrics_of_the_previous_step(watched: Watched) -> None:
    reads: list[int] = []
    for event in watched.events[watched.events.index("step") :]:
        if event == "step":
            reads.append(0)
        else:
            reads[-1] += 1
    # During the first step: nothing. During each of the next ones: as many arrays as the previous
    # step has metrics. (The last one is followed by its own metrics and the evaluation.)
    assert reads[0] == 0
    assert len(set(reads[1:-1])) == 1
    line = lines_of(watched.workdir)[1]
    of_host = {"tokens_per_second", "supervised_tokens_per_second", "step_seconds"}
    of_host |= {"skipped_steps", "tflops_per_device"}
    of_step = [
        name
        for name in line.keys() - {"step", "memory/host_peak_gb"}
        if name.removeprefix("train/") not in of_host
    ]
    assert reads[1] == len(of_step) + len({"tokens", "supervised_tokens", "seen", "nonfinite"})


def test_a_line_of_the_log_has_every_metric(watched: Watched) -> None:
    line = lines_of(watched.workdir)[1]
    assert {
        *("train/loss", "train/nll", "train/perplexity", "train/accuracy", "train/entropy"),
        *("train/grad_norm", "train/learning_rate", "train/step_seconds"),
        *("train/tokens_per_second", "train/supervised_tokens_per_second"),
        *("train/tflops_per_device", "train/noise_region_bound", "train/skipped_steps"),
        *("weight/mean", "weight/effective_fraction", "weight/clipped", "rank/mean"),
        *("weight/p05", "weight/p50", "weight/p95", "memory/host_peak_gb"),
    } == line.keys() - {"step"}
    assert all(np.isfinite(value) for value in line.values())
    for evaluated in (lines_of(watched.workdir)[0], lines_of(watched.workdir)[-1]):
        assert {"eval/nll", "eval/perplexity", "eval/token_accuracy"} <= evaluated.keys()


def test_the_chosen_steps_are_profiled(tiny_config: MakeConfig, tmp_path: pathlib.Path) -> None:
    config = tiny_config(
        train__profile_steps="2,3",
        train__steps=4,
        checkpoint__every_steps=0,
        eval__task="",
        telemetry__tensorboard=False,
    )
    assert config.train.profile_steps == (2, 3)
    train_and_evaluate(config, tmp_path)
    [trace] = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"train_step" in trace.read_bytes()
    assert not (tmp_path / "tensorboard").exists()
    assert "tensorboard" not in json.loads((tmp_path / "result.json").read_text())["paths"]


@pytest.mark.parametrize("steps", ["3", "3,2", "0,2", "1,2,3"])
def test_profile_steps_must_be_a_first_and_a_last_step(steps: str, tiny_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"train\.profile_steps: expected"):
        tiny_config(train__profile_steps=f"({steps},)")
