"""What a run logs, what it costs to log it, and that one program takes all steps."""

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
from ranktuner_jax.train import TrainConfig, loop, train_and_evaluate, utilisation
from ranktuner_jax.train.utilisation import Utilisation, peak_flops, step_flops

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


def test_the_operations_of_a_step_are_those_that_xla_counts() -> None:
    rows, length = 4, 16
    graph, params = nnx.split(models.Decoder(TINY, rngs=nnx.Rngs(0)), nnx.Param)

    def loss(params: nnx.State, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        return jnp.sum(model.logits(model(tokens)) ** 2)

    tokens = jnp.zeros((rows, length), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile()
    count = rows * length
    # XLA computes both halves of the attention, and counts what is no matrix product too.
    ours = step_flops(TINY, tokens=count, supervised=count, seen=count * length)
    assert 0.8 < ours / compiled.cost_analysis()["flops"] < 1.02


def test_a_token_that_is_not_supervised_does_not_reach_the_unembedding() -> None:
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
def test_the_peak_of_a_device_goes_by_its_kind(kind: str, teraflops: float | None) -> None:
    peak = peak_flops(kind)
    assert peak == (None if teraflops is None else teraflops * 1e12)


class Device:
    device_kind = "NVIDIA H100 80GB HBM3"

    def __init__(self, peak: int) -> None:
        self.peak = peak

    def memory_stats(self) -> dict[str, int]:
        return {"peak_bytes_in_use": self.peak}


def test_a_device_that_is_known_has_a_utilisation_and_a_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices: Any = [Device(3 * 10**9), Device(5 * 10**9)]
    monkeypatch.setattr(utilisation.jax, "local_devices", lambda: devices)
    counts = {"tokens": 1e6, "supervised": 5e5, "seen": 1e8}
    numbers = Utilisation(TINY, devices).metrics(**counts, seconds=2.0)
    per_device = step_flops(TINY, **counts) / 2 / 2
    assert numbers["mfu"] == pytest.approx(per_device / 989e12)
    assert numbers["tflops_per_device"] == pytest.approx(per_device / 1e12)
    assert numbers["memory/device_peak_gb"] == 5.0


def test_a_device_that_is_not_known_has_none() -> None:
    numbers = Utilisation(TINY, jax.devices()).metrics(tokens=9, supervised=9, seen=9, seconds=1.0)
    assert numbers.keys() == {"tflops_per_device", "memory/host_peak_gb"}
    assert 0.05 < numbers["memory/host_peak_gb"] < 1000


class Watched:
    """A run, and the order in which its steps were started and its arrays were read."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.compiled: list[str] = []
        self.workdir = pathlib.Path()


@pytest.fixture(scope="module")
def watched(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    run = Watched()
    run.workdir = tmp_path_factory.mktemp("watched")
    make_train_step = loop.make_train_step

    class Step:
        def __init__(self, *arguments: Any) -> None:
            self.step = make_train_step(*arguments)

        def lower(self, *arguments: Any) -> Step:
            self.lowered = self.step.lower(*arguments)
            return self

        def compile(self) -> Callable[..., Any]:
            compiled = self.lowered.compile()
            run.events.append("compiled")

            def dispatch(*arguments: Any) -> Any:
                run.events.append("step")
                return compiled(*arguments)

            return dispatch

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Finished XLA compilation"):
                run.compiled.append(record.getMessage())

    array = type(jnp.zeros(1))
    value = array._value

    def read(self: Any) -> np.ndarray:
        run.events.append("read")
        return value.fget(self)

    handler, logger = Handler(), logging.getLogger("jax._src.dispatch")
    with pytest.MonkeyPatch.context() as patch, jax.log_compiles():
        logger.addHandler(handler)
        patch.setattr(loop, "make_train_step", Step)
        patch.setattr(array, "_value", property(read))
        config = tiny_config(checkpoint__every_steps=0, eval__task="")
        assert train_and_evaluate(config, run.workdir) == 0
        logger.removeHandler(handler)
    return run


def test_one_program_takes_all_steps(watched: Watched) -> None:
    assert watched.compiled  # It hears of compilations.
    assert sum("train_step" in message for message in watched.compiled) == 1
    assert watched.events.count("compiled") == 1
    assert watched.events.count("step") == 6


def test_the_host_reads_nothing_but_the_metrics_of_the_step_before(watched: Watched) -> None:
    loop_events = watched.events[watched.events.index("compiled") + 1 :]
    reads, current = [], 0
    for event in loop_events:
        if event == "step":
            reads.append(current)
            current = 0
        else:
            current += 1
    # Before the first step and between the first and the second: nothing. Then, each time, as
    # many arrays as a step has metrics.
    assert reads[:2] == [0, 0]
    assert len(set(reads[2:])) == 1
    line = lines_of(watched.workdir)[1]
    made_here = {"tokens_per_second", "supervised_tokens_per_second", "step_seconds"}
    made_here |= {"skipped_steps", "tflops_per_device"}
    of_step = [
        name
        for name in line.keys() - {"step", "memory/host_peak_gb"}
        if name.removeprefix("train/") not in made_here
    ]
    assert reads[2] == len(of_step) + len({"tokens", "supervised_tokens", "seen", "nonfinite"})


def test_a_line_holds_all_that_there_is_to_know(watched: Watched) -> None:
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


def test_steps_that_are_asked_for_are_traced(
    tiny_config: MakeConfig, tmp_path: pathlib.Path
) -> None:
    config = tiny_config(
        train__profile_steps="2,3",
        train__steps=4,
        checkpoint__every_steps=0,
        eval__task="",
        telemetry__tensorboard=False,
    )
    assert config.train.profile_steps == (2, 3)
    assert train_and_evaluate(config, tmp_path) == 0
    [trace] = (tmp_path / "profile").rglob("*.xplane.pb")
    # The step's name is in it once for each of both steps that it holds.
    assert b"train_step" in trace.read_bytes()
    assert not (tmp_path / "tensorboard").exists()
    assert "tensorboard" not in json.loads((tmp_path / "result.json").read_text())["paths"]


@pytest.mark.parametrize("steps", ["3", "3,2", "0,2", "1,2,3"])
def test_steps_to_trace_are_a_first_and_a_last(steps: str, tiny_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"train\.profile_steps: expected"):
        tiny_config(train__profile_steps=f"({steps},)")
