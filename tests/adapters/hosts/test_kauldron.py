"""RankTuner in Kauldron's own trainer, which needs TensorFlow."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from kauldron import kd, kontext
from kauldron.train.metric_writer import NoopWriter

from ranktuner_jax import losses
from ranktuner_jax.adapters.kauldron import RankTunerLoss, RankTunerMetrics


class Model(nn.Module):
    tokens: kontext.Key = "batch.tokens"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(61, 16, name="embed")(tokens)
        return nn.LayerNorm(name="norm")(x + nn.Dense(16)(nn.relu(nn.Dense(32)(x))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log(NoopWriter):
    scalars: ClassVar[list[dict[str, Any]]] = []  # Of the class: the trainer copies its writer.

    def write_step_metrics(self, *, aux: Any, **_: Any) -> None:
        values = aux.compute()
        self.scalars.append({**values.loss_values, **values.metric_values})


def make_trainer(rows: Any, weighting: losses.Weighting, rate: float, path: Any) -> Any:
    inputs: dict[str, Any] = {
        "hidden": "interms.norm.__call__[0]",
        "unembed": "params.embed.embedding",
        "labels": "batch.labels",
        "mask": "batch.mask",
        "weighting": weighting,
    }
    batch = {
        "tokens": rows.tokens[:, :-1],
        "labels": rows.tokens[:, 1:, None],
        "mask": rows.mask[:, 1:, None],
    }
    Log.scalars.clear()
    return kd.train.Trainer(
        train_ds=kd.data.InMemoryPipeline(loader=lambda: batch, batch_size=4),
        model=Model(),
        optimizer=optax.sgd(rate),
        train_losses={"ranktuner": RankTunerLoss(**inputs)},
        train_metrics={"ranktuner": RankTunerMetrics(**inputs)},
        log_metrics_every=1,
        num_train_steps=10,
        writer=Log(),
        workdir=path,
    )


def dense_loss(params: Any, rows: Any, weighting: losses.Weighting) -> Any:
    hidden = Model().apply({"params": params}, rows.tokens[:, :-1])
    labels, mask = jnp.asarray(rows.tokens[:, 1:]), rows.mask[:, 1:]
    output = losses.weighted_nll(
        hidden @ params["embed"]["embedding"].T, labels, mask, weighting=weighting
    )
    return output.mean(), output


def test_one_step_takes_the_value_and_gradient_of_the_dense_loss(
    rows: Any,
    weighting: losses.Weighting,
    assert_close: Callable[..., None],
    tmp_path: Any,
) -> None:
    trainer = make_trainer(rows, weighting, 1.0, tmp_path)
    before = jax.tree.map(np.array, trainer.init_state().params)
    (loss, output), gradient = jax.jit(
        jax.value_and_grad(lambda params: dense_loss(params, rows, weighting), has_aux=True)
    )(before)
    state, _ = dataclasses.replace(trainer, stop_after_steps=1).train()
    assert_close(jax.tree.map(np.subtract, before, state.params), gradient)
    [logged] = Log.scalars
    assert_close(logged["losses/ranktuner"], loss)
    summary = losses.summarize(output)
    assert_close({name: logged[f"metrics/ranktuner/{name}"] for name in summary}, summary)


def test_three_steps_lower_the_nll(rows: Any, weighting: losses.Weighting, tmp_path: Any) -> None:
    trainer = make_trainer(rows, weighting, 0.1, tmp_path)
    dataclasses.replace(trainer, stop_after_steps=3).train()
    first, second, third = (row["metrics/ranktuner/nll"] for row in Log.scalars)
    assert third < second < first


def test_the_example_learns(run_example: Callable[[str], list[float]]) -> None:
    nll = run_example("kauldron_sft")
    assert nll[-1] < 0.5 * nll[0]
