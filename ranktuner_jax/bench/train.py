"""Measure a whole training step: RankTuner by SFT, fused by dense, ours by torch, the input's wait.

ranktuner bench train
ranktuner bench train --compute_dtype=float32 --batch_size=4 --length=512 --remat=none

Every case takes the optimizer step of the config's own run, on the same batch and the same weights:
at a learning rate of 0 AdamW does all of its work and changes nothing, so that equal losses show
that the cases compute the same. The repeats of all cases are interleaved, and a ratio is the median
of the ratios within a repeat.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from ranktuner_jax import data, losses, models
from ranktuner_jax.bench.loss import torch_ranktuner
from ranktuner_jax.errors import UserError
from ranktuner_jax.train import (
    TrainConfig,
    init_state,
    load_config,
    make_mesh,
    make_optimizer,
    make_train_step,
    place_batch,
)
from ranktuner_jax.train.commands import flags

__all__ = ["Case", "add_arguments", "input_share", "jax_cases", "ratio", "run", "torch_cases"]

DTYPES = ("bfloat16", "float32")
FUSED, SFT, DENSE = "RankTuner, fused", "SFT, the nll alone", "RankTuner, dense"
TORCH = {False: "torch, logits of all positions", True: "torch, hidden states filtered"}


@dataclasses.dataclass
class Case:
    """One way to take a step.

    Attributes:
      name: What is measured.
      dtype: Type of the activations.
      step: Takes a step, waits for it and returns the loss.
      temp_bytes: Memory that XLA needs beside state and batch; None for torch.
      loss: What the last step returned.
      seconds: The time of each repeat.
    """

    name: str
    dtype: str
    step: Callable[[], float]
    temp_bytes: int | None = None
    loss: float = float("nan")
    seconds: list[float] = dataclasses.field(default_factory=list)

    def time(self) -> None:
        """Takes one more step, after one that finds the memory as another case left it."""
        self.step()
        start = time.perf_counter()
        self.loss = self.step()
        self.seconds.append(time.perf_counter() - start)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ranktuner bench train`."""
    flags.add_config(parser, default="smollm2_chain_sum")
    parser.add_argument("--model", help="another model than the config's")
    parser.add_argument("--batch_size", type=int, help="rows a step [the config's]")
    parser.add_argument("--length", type=int, help="tokens a row [the config's]")
    parser.add_argument("--remat", help="none, dots or full [the config's]")
    parser.add_argument(
        "--compute_dtype", choices=DTYPES, nargs="+", default=DTYPES, help="[both in turn]"
    )
    parser.add_argument("--repeats", type=int, default=5, help="steps of each case [%(default)s]")


def run(args: argparse.Namespace) -> int:
    """Prints the steps and what follows from them."""
    if args.repeats < 1:
        raise UserError(f"--repeats: expected at least 1, got {args.repeats}")
    config = _config(args)
    folder = models.resolve(config.model)
    rows = data.load_rows(config.data, data.load_tokenizer(folder), seed=config.seed)
    batch = next(data.BatchIterator(rows, batch_size=config.train.batch_size, seed=config.seed))

    cases, waits = [], []
    for dtype in args.compute_dtype:
        _say(f"compiling for {dtype} ...")
        box = _Box(config, folder, dtype)
        cases += jax_cases(box, batch)
        waits.append((dtype, box))
    if importlib.util.find_spec("torch") is None:
        _say("torch is not installed (extra `parity`): no comparison with it")
    else:
        cases += torch_cases(folder, config, batch, args.compute_dtype)
    for repeat in range(args.repeats):
        for case in cases:
            case.time()
            _say(
                f"{repeat + 1}/{args.repeats}  {case.name}, {case.dtype}: {case.seconds[-1]:.2f} s"
            )
    shares = {dtype: input_share(box, rows, args.repeats) for dtype, box in waits}
    console = Console(highlight=False)
    console.print(_steps_table(cases, batch))
    console.print(_ratios_table(cases, shares))
    return 0


def _config(args: argparse.Namespace) -> TrainConfig:
    chosen = {
        "model": args.model,
        "train.batch_size": args.batch_size,
        "data.row_length": args.length,
        "train.remat": args.remat,
        "optimizer.learning_rate": 0.0,
        "optimizer.schedule": "constant",
        "optimizer.warmup_ratio": 0.0,
    }
    overrides = [f"--config.{key}={value}" for key, value in chosen.items() if value is not None]
    return load_config(args.config, [*overrides, *args.overrides])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Box:
    """A train state that the cases of one dtype step in turn; each takes and donates it."""

    def __init__(self, config: TrainConfig, folder: pathlib.Path, dtype: str) -> None:
        train = dataclasses.replace(config.train, compute_dtype=dtype)
        self.config = dataclasses.replace(config, train=train)
        self.mesh = make_mesh(config.mesh)
        model = models.load_pretrained(
            folder,
            mesh=self.mesh,
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(train.param_dtype),
            remat=train.remat,
        )
        self.state = init_state(model, make_optimizer(config.optimizer, 1), self.mesh)

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return place_batch(self.mesh, batch, self.config.train.accumulation)

    def compile(self, config: TrainConfig, batch: Mapping[str, np.ndarray], lean: bool) -> Any:
        step = make_train_step(config, 1, self.mesh, self.state)

        def loss_alone(state: Any, batch: Any) -> Any:
            state, metrics = step(state, batch)
            return state, {"loss": metrics["loss"]}  # XLA drops what nobody reads.

        chosen = jax.jit(loss_alone, donate_argnums=0) if lean else step
        return chosen.lower(self.state, self.place(batch)).compile()


def jax_cases(box: _Box, batch: Mapping[str, np.ndarray]) -> list[Case]:
    """The run's own step, plain SFT without any statistic, and the loss from whole logits."""
    config = box.config
    plain = dataclasses.replace(
        config, loss=dataclasses.replace(config.loss, weighting="sft", options={})
    )
    programs = {
        FUSED: box.compile(config, batch, lean=False),
        SFT: box.compile(plain, batch, lean=True),
    }
    with mock.patch.object(losses, "sharded_weighted_nll", _dense_loss):
        programs[DENSE] = box.compile(config, batch, lean=False)
    placed = box.place(batch)

    def step(program: Any) -> float:
        box.state, metrics = program(box.state, placed)
        loss = float(metrics["loss"])
        jax.block_until_ready(box.state)
        return loss

    return [
        Case(
            name,
            config.train.compute_dtype,
            functools.partial(step, program),
            program.memory_analysis().temp_size_in_bytes,
        )
        for name, program in programs.items()
    ]


def _dense_loss(mesh: Mesh, *, weighting: Any, vocab_size: int, **_: Any) -> Any:
    """Stands in the step where the fused loss does."""

    def loss(hidden: Any, unembed: Any, labels: Any, mask: Any, **options: Any) -> Any:
        logits = jnp.einsum(
            "btd,vd->btv", hidden, unembed.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        return losses.weighted_nll(
            logits, labels, mask, weighting=weighting, vocab_size=vocab_size, **options
        )

    return loss


def torch_cases(
    folder: pathlib.Path,
    config: TrainConfig,
    batch: Mapping[str, np.ndarray],
    dtypes: tuple[str, ...],
) -> list[Case]:
    """The same step in transformers and eager torch: weights, batch, loss, clipping and AdamW.

    bfloat16 is torch's autocast: as in ours, parameters and optimizer stay float32.
    """
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    named, options = dict(model.named_parameters()), config.optimizer
    spared = [p for name, p in named.items() if re.search("norm|bias", name)]
    decayed = [p for name, p in named.items() if not re.search("norm|bias", name)]
    groups: Any = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.b1, options.b2),
        weight_decay=options.weight_decay,
        fused=True,
    )
    tokens, labels, positions, segments = (
        torch.from_numpy(batch[name]).long()
        for name in ("tokens", "labels", "positions", "segment_ids")
    )
    supervised = torch.from_numpy(batch["mask"])
    # Only within a conversation, and only backwards.
    seen = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]

    def step(dtype: str, filter_first: bool) -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = model.model(
                tokens, attention_mask=seen, position_ids=positions, use_cache=False
            ).last_hidden_state
            logits = model.lm_head(hidden[supervised] if filter_first else hidden)
        logits = logits if filter_first else logits[supervised]
        base = config.loss.options["base"]
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


def input_share(box: _Box, rows: data.Rows, steps: int) -> float:
    """The share of a run's time in which it waits for the next batch and its way to the device."""
    batches = data.BatchIterator(rows, batch_size=box.config.train.batch_size, seed=1)
    program = box.compile(box.config, next(batches), lean=False)
    waited, before = 0.0, None
    begun = time.perf_counter()
    for _ in range(steps):
        start = time.perf_counter()
        batch = box.place(next(batches))
        waited += time.perf_counter() - start
        # As in a run: the metrics of a step are read once the next one is under way.
        box.state, metrics = program(box.state, batch)
        if before is not None:
            jax.device_get(before)
        before = metrics
    jax.block_until_ready(box.state)
    return waited / (time.perf_counter() - begun)


def _steps_table(cases: list[Case], batch: Mapping[str, np.ndarray]) -> Table:
    rows, length = batch["tokens"].shape
    cores = len(os.sched_getaffinity(0))
    table = Table(
        title=f"a step: {rows} rows of {length} tokens, {batch['mask'].mean():.0%} supervised, "
        f"{jax.devices()[0].device_kind}, {cores} cores"
    )
    table.add_column("")
    for column in ("activations", "loss", "median", "fastest", "temp memory"):
        table.add_column(column, justify="right")
    for case in cases:
        table.add_row(
            case.name,
            case.dtype,
            f"{case.loss:.4f}",
            f"{statistics.median(case.seconds):.3f} s",
            f"{min(case.seconds):.3f} s",
            "" if case.temp_bytes is None else f"{case.temp_bytes / 1e6:,.0f} MB",
        )
    return table


def _ratios_table(cases: list[Case], shares: Mapping[str, float]) -> Table:
    table = Table(title="what follows")
    for column in ("", "activations", "ratio", "wanted"):
        table.add_column(column, justify="left" if not column else "right")
    for dtype, share in shares.items():
        by_name = {case.name: case for case in cases if case.dtype == dtype}
        ours = by_name[FUSED]
        for name, wanted in ((SFT, 1.03), (DENSE, 1.0), *((name, 0.9) for name in TORCH.values())):
            if name in by_name:
                value = ratio(ours, by_name[name])
                table.add_row(f"{FUSED} ÷ {name}", dtype, f"{value:.3f}", f"≤ {wanted}")
        theirs = by_name[DENSE].temp_bytes
        if ours.temp_bytes and theirs:
            memory = ours.temp_bytes / theirs
            table.add_row("its temp memory ÷ that of dense", dtype, f"{memory:.3f}", "≤ 1.0")
        table.add_row("waiting for input ÷ all", dtype, f"{share:.2%}", "< 1 %")
    return table


def ratio(ours: Case, other: Case) -> float:
    """The median of the ratios within a repeat: what slows the machine down slows both."""
    return statistics.median(a / b for a, b in zip(ours.seconds, other.seconds, strict=True))
