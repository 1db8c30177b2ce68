"""RankTuner in Levanter: its own trainer, on a tiny Llama of its own, over two devices."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import levanter.tracker
import numpy as np
import optax
import pytest
from levanter.models.llama import LlamaConfig
from levanter.models.lm_model import LmExample
from levanter.tracker import NoopConfig, NoopTracker
from levanter.trainer import Trainer, TrainerConfig

from ranktuner_jax import losses
from ranktuner_jax.adapters.levanter import next_token_loss


class Log(NoopTracker):
    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []

    def log(self, metrics: Any, *, step: int | None, commit: bool | None = None) -> None:
        self.metrics += [dict(metrics)] if "train/ranktuner/nll" in metrics else []


def make_config(**options: Any) -> TrainerConfig:
    return TrainerConfig(
        id="test",
        tracker=NoopConfig(),
        train_batch_size=4,
        num_train_steps=3,
        load_checkpoint=False,
        log_jaxprs=False,
        log_xla_hlo=False,
        **options,
    )


def make_model(tied: bool = True) -> Any:
    config = LlamaConfig(
        max_seq_len=16,
        hidden_dim=16,
        intermediate_dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        tie_word_embeddings=tied,
        gradient_checkpointing=False,
    )
    return config.build(hax.Axis("vocab", 61), key=jax.random.key(0))


def example(rows: Any) -> LmExample:
    """Levanter's batch: the weight of a position is that of the token after it."""
    batch, position = hax.Axis("batch", 4), hax.Axis("position", 16)
    weight = jnp.asarray(np.roll(rows.mask, -1, axis=1), jnp.float32)
    return LmExample(
        hax.named(jnp.asarray(rows.tokens), (batch, position)),
        hax.named(weight, (batch, position)),
    )


def dense_loss(model: Any, rows: Any, weighting: losses.Weighting) -> Any:
    batch = example(rows)
    logits = model(batch.tokens, batch.attn_mask)
    logits = logits.rearrange(("batch", "position", "vocab")).array
    output = losses.weighted_nll(
        logits[:, :-1], jnp.asarray(rows.tokens[:, 1:]), rows.mask[:, 1:], weighting=weighting
    )
    return output.mean(), output


def train(
    model: Any, rows: Any, loss_fn: Any, config: TrainerConfig, rate: float, steps: int = 3
) -> tuple[list[float], list[dict[str, Any]], Any]:
    """The losses that Levanter reports, the metrics that it logs, and the trained model."""
    log = Log()
    batches = [example(rows)] * steps
    with (
        levanter.tracker.current_tracker(log),
        Trainer(config, optax.sgd(rate), loss_fn, add_default_hooks=False) as trainer,
    ):
        state = trainer.initial_state(jax.random.key(1), model=model)
        reported = []
        for info in trainer.training_steps(state, batches):
            reported.append(float(info.loss))
            trained = jax.tree.map(np.array, eqx.filter(info.state.model, eqx.is_array))
    return reported, log.metrics, trained


@pytest.mark.parametrize("tied", [True, False])
def test_one_step_takes_the_value_and_gradient_of_the_dense_loss(
    rows: Any, weighting: losses.Weighting, assert_close: Callable[..., None], tied: bool
) -> None:
    model = make_model(tied)
    before = jax.tree.map(np.array, eqx.filter(model, eqx.is_array))
    (loss, output), gradient = eqx.filter_jit(
        eqx.filter_value_and_grad(lambda model: dense_loss(model, rows, weighting), has_aux=True)
    )(model)
    config = make_config()
    reported, [logged], after = train(
        model, rows, next_token_loss(config, weighting), config, rate=1.0, steps=1
    )
    assert_close(reported, [np.asarray(loss)])
    summary = losses.summarize(output)
    assert_close({name: logged[f"train/ranktuner/{name}"] for name in summary}, summary)
    moved = jax.tree.map(np.subtract, before, after)
    assert_close(jax.tree.leaves(moved), jax.tree.leaves(gradient))


def test_micro_batches_are_refused_with_what_to_set(weighting: losses.Weighting) -> None:
    with pytest.raises(ValueError, match="micro-batches of 2; set per_device_parallelism=-1"):
        next_token_loss(make_config(per_device_parallelism=1), weighting)
    next_token_loss(make_config(per_device_parallelism=2), weighting)


def test_levanters_own_accumulation_differs_from_one_batch(rows: Any) -> None:
    """What the refusal is for. If this fails, Levanter accumulates sums: drop the refusal."""

    def plain(model: Any, batch: LmExample, *, key: Any = None) -> Any:
        return model.compute_next_token_loss(batch, key=key)

    whole, parts = (
        train(make_model(), rows, plain, make_config(**options), rate=1.0, steps=1)[2]
        for options in ({}, {"per_device_parallelism": 1})
    )
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole, parts)
    assert max(jax.tree.leaves(difference)) > 1e-3


def test_three_steps_lower_the_nll_that_levanter_itself_computes(
    rows: Any, weighting: losses.Weighting
) -> None:
    model, config = make_model(), make_config()
    plain = float(model.compute_next_token_loss(example(rows)).array)
    _, logged, _ = train(model, rows, next_token_loss(config, weighting), config, rate=0.1)
    nll = [float(metrics["train/ranktuner/nll"]) for metrics in logged]
    np.testing.assert_allclose(nll[0], plain, rtol=1e-5)
    assert len(nll) == 3
    assert nll[2] < nll[1] < nll[0]


def test_the_example_learns(run_example: Callable[[str], list[float]]) -> None:
    nll = run_example("levanter_sft")
    assert nll[-1] < 0.5 * nll[0]
