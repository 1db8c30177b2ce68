"""Measure a training step: RankTuner compared with SFT, dense and torch, and the wait for input.

ranktuner bench train
ranktuner bench train --compute_dtype float32 --config.train.batch_size=4 --config.train.remat=none

Every case takes the optimizer step of the config on the same batch and the same weights: with a
learning rate of 0, AdamW does all of its work but changes no weights, so that equal losses show
that the cases compute the same. The repeats of all cases are interleaved, and a ratio is the median
of the ratios within each repeat.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ranktuner_jax import data, losses
from ranktuner_jax.bench.records import Record, add_json, show
from ranktuner_jax.bench.torch_losses import torch_ranktuner
from ranktuner_jax.errors import UserError
from ranktuner_jax.train import (
    Run,
    TrainConfig,
    init_state,
    load_config,
    make_train_step,
    place_batch,
)
from ranktuner_jax.train.commands import flags

__all__ = [
    "FUSED",
    "SFT",
    "Case",
    "SharedState",
    "add_arguments",
    "jax_cases",
    "open_runs",
    "ratio",
    "run",
]

DTYPES = ("bfloat16", "float32")
FUSED, SFT, DENSE = "RankTuner, fused", "SFT, NLL only", "RankTuner, dense"
FROZEN = (
    "--config.optimizer.learning_rate=0.0",
    "--config.optimizer.schedule=constant",
    "--config.optimizer.warmup_ratio=0.0",
)
TORCH = {False: "torch, logits of all positions", True: "torch, hidden states filtered"}


@dataclasses.dataclass
class Case:
    """One implementation of the step.

    Attributes:
      name: The implementation.
      dtype: Type of the activations.
      step: Takes a step, waits for it and returns the loss.
      temp_bytes: Memory that XLA needs besides state and batch; None for torch.
      loss: The loss of the last step.
      seconds: Time of each repeat.
    """

    name: str
    dtype: str
    step: Callable[[], float]
    temp_bytes: int | None = None
    loss: float = float("nan")
    seconds: list[float] = dataclasses.field(default_factory=list)

    def time(self) -> None:
        """Times one step, after another one that warms up the caches."""
        self.step()
        start = time.perf_counter()
        self.loss = self.step()
        self.seconds.append(time.perf_counter() - start)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner bench train`."""
    flags.add_config(parser, default="smollm2_chain_sum")
    parser.add_argument(
        "--compute_dtype",
        choices=DTYPES,
        nargs="+",
        default=DTYPES,
        help="types of the activations, instead of the config's [both]",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per case [%(default)s]")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the times of all cases and the ratios between them."""
    if args.repeats < 1:
        raise UserError(f"--repeats: expected at least 1, got {args.repeats}")
    config = load_config(args.config, [*FROZEN, *args.overrides])
    runs = open_runs(config, args.compute_dtype)
    first = next(iter(runs.values()))
    size = config.train.batch_size
    batch = next(data.BatchIterator(first.rows, batch_size=size, seed=config.seed))

    cases, states = [], {}
    for dtype, opened in runs.items():
        _print_status(f"compiling for {dtype} ...")
        states[dtype] = SharedState(opened)
        cases += jax_cases(states[dtype], batch)
    if importlib.util.find_spec("torch") is None:
        _print_status("torch is not installed (extra `parity`): no comparison with it")
    elif config.lora.is_on:
        _print_status("torch trains the whole model: no comparison with it")
    else:
        cases += _torch_cases(first, batch, list(runs))
    for repeat in range(args.repeats):
        for case in cases:
            case.time()
            _print_status(
                f"{repeat + 1}/{args.repeats}  {case.name}, {case.dtype}: {case.seconds[-1]:.2f} s"
            )
    shares = {dtype: _input_share(shared, args.repeats) for dtype, shared in states.items()}
    show(_records(cases, shares, batch), as_json=args.json)
    return 0


def open_runs(config: TrainConfig, dtypes: Sequence[str]) -> dict[str, Run]:
    """The run of a config for each activation type; all share the rows of the first."""
    runs: dict[str, Run] = {}
    for dtype in dtypes:
        train = dataclasses.replace(config.train, compute_dtype=dtype)
        runs[dtype] = Run.open(dataclasses.replace(config, train=train))
        runs[dtype].rows = runs[dtypes[0]].rows
    return runs


def _print_status(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class SharedState:
    """The train state of a run, shared by its cases because every step donates it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.state = init_state(run.model, run.tx, run.mesh)

    def place(self, batch: data.Batch) -> data.Batch:
        """The batch on the mesh."""
        return place_batch(self.run.mesh, batch, self.run.config.train.accumulation)

    def compile(self, batch: data.Batch, *, loss_only: bool = False, **options: Any) -> Any:
        """Compiles the run's step.

        Args:
          batch: A batch, for its shape.
          loss_only: Whether to return only the loss, so that XLA removes the other metrics.
          options: Options of `make_train_step` that override the run's.
        """
        step = make_train_step(self.state, self.run.mesh, **self.run.step_options | options)

        def only_loss(state: Any, batch: Any) -> Any:
            state, metrics = step(state, batch)
            return state, {"loss": metrics["loss"]}

        chosen = jax.jit(only_loss, donate_argnums=0) if loss_only else step
        return chosen.lower(self.state, self.place(batch)).compile()

    def step(self, program: Any, batch: data.Batch) -> dict[str, jax.Array]:
        """Starts a step of a compiled program on a placed batch; returns its metrics."""
        self.state, metrics = program(self.state, batch)
        return metrics


def jax_cases(
    shared: SharedState, batch: data.Batch, names: Sequence[str] = (FUSED, SFT, DENSE)
) -> list[Case]:
    """The run's own step, SFT without statistics, and the loss from full logits."""
    options: dict[str, dict[str, Any]] = {
        FUSED: {},
        SFT: {"loss_only": True, "weighting": losses.SFT()},
        DENSE: {"make_loss": _dense_loss},
    }
    programs = {name: shared.compile(batch, **options[name]) for name in names}
    placed = shared.place(batch)

    def step(program: Any) -> float:
        loss = float(shared.step(program, placed)["loss"])
        jax.block_until_ready(shared.state)
        return loss

    return [
        Case(
            name,
            shared.run.config.train.compute_dtype,
            functools.partial(step, program),
            program.memory_analysis().temp_size_in_bytes,
        )
        for name, program in programs.items()
    ]


def _dense_loss(mesh: Mesh, *, weighting: Any, vocab_size: int, **_: Any) -> Any:
    """Like `losses.sharded_weighted_nll`, from full logits."""

    def loss(hidden: Any, unembed: Any, labels: Any, mask: Any, **options: Any) -> Any:
        logits = jnp.einsum(
            "btd,vd->btv", hidden, unembed.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        return losses.weighted_nll(
            logits, labels, mask, weighting=weighting, vocab_size=vocab_size, **options
        )

    return loss


def _torch_cases(run: Run, batch: data.Batch, dtypes: Sequence[str]) -> list[Case]:
    """The same step in transformers and eager torch: weights, batch, loss, clipping and AdamW.

    bfloat16 uses torch's autocast: as in JAX, parameters and optimizer state stay in float32.
    """
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.float32)
    model.train()
    named, options = dict(model.named_parameters()), run.config.optimizer
    not_decayed = [p for name, p in named.items() if re.search("norm|bias", name)]
    decayed = [p for name, p in named.items() if not re.search("norm|bias", name)]
    groups: Any = [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.b1, options.b2),
        weight_decay=options.weight_decay,
        fused=True,
    )
    tokens, labels, positions, segments = (
        torch.from_numpy(array).long()
        for array in (batch.tokens, batch.labels, batch.positions, batch.segment_ids)
    )
    supervised = torch.from_numpy(batch.mask)
    # Causal attention within each conversation.
    seen = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]

    def step(dtype: str, filter_first: bool) -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = model.model(
                tokens, attention_mask=seen, position_ids=positions, use_cache=False
            ).last_hidden_state
            logits = model.lm_head(hidden[supervised] if filter_first else hidden)
        logits = logits if filter_first else logits[supervised]
        base = run.config.loss.options["base"]
        loss = torch_ranktuner(torch, logits, labels[supervised], base)
        loss.backward()
        if options.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        optimizer.step()
        return float(loss.detach())

    return [
        Case(TORCH[filter_first], dtype, functools.partial(step, dtype, filter_first))
        for dtype in dtypes
        for filter_first in (False, True)
    ]


def _input_share(shared: SharedState, steps: int) -> float:
    """The fraction of time that training waits for the next batch and its transfer."""
    run = shared.run
    batches = data.BatchIterator(run.rows, batch_size=run.config.train.batch_size, seed=1)
    program = shared.compile(next(batches))
    waited, before = 0.0, None
    begun = time.perf_counter()
    for _ in range(steps):
        start = time.perf_counter()
        batch = shared.place(next(batches))
        waited += time.perf_counter() - start
        # As in training, the metrics of a step are read once the next one is running.
        metrics = shared.step(program, batch)
        if before is not None:
            jax.device_get(before)
        before = metrics
    jax.block_until_ready(shared.state)
    return waited / (time.perf_counter() - begun)


def _records(
    cases: Sequence[Case], shares: Mapping[str, float], batch: data.Batch
) -> Iterator[Record]:
    """Each case, with what the fused step takes in comparison, and the wait for input."""
    rows, length = batch.tokens.shape
    supervised = batch.mask.mean()
    for dtype, share in shares.items():
        setting = f"one step of {rows} rows of {length}, {supervised:.0%} supervised, {dtype}"
        by_name = {case.name: case for case in cases if case.dtype == dtype}
        fused = by_name[FUSED]
        for name, case in by_name.items():
            figures = {
                "loss": case.loss,
                "median_s": statistics.median(case.seconds),
                "fastest_s": min(case.seconds),
                "temp_bytes": case.temp_bytes,
                "fused ÷ this": ratio(fused, case),
            }
            if name == FUSED:
                figures["waiting for input_share"] = share
            yield Record("train", setting, name, figures, dtype)


def ratio(ours: Case, other: Case) -> float:
    """The median of the ratios within each repeat, in which machine noise affects both."""
    return statistics.median(a / b for a, b in zip(ours.seconds, other.seconds, strict=True))
