"""RankTuner in Tunix: its own trainer, on a tiny Qwen3 of its own."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.sft import peft_trainer, utils

from ranktuner_jax import losses
from ranktuner_jax.adapters.tunix import RankTunerTrainer


def make_model() -> qwen3.Qwen3:
    config = qwen3.ModelConfig(
        num_layers=2,
        vocab_size=61,
        embed_dim=16,
        hidden_dim=32,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    return qwen3.Qwen3(config, rngs=nnx.Rngs(0))


def model_input(batch: peft_trainer.TrainingInput) -> dict[str, jax.Array]:
    present = jnp.ones_like(batch.input_mask)
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(present),
        "attention_mask": utils.make_causal_attn_mask(present),
    }


def parameters(model: nnx.Module) -> Any:
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def train(trainer: Any, batches: Iterable[Any], evaluate_on: Any = None) -> Any:
    trainer.with_gen_model_input_fn(model_input).train(batches, evaluate_on)
    return trainer


def make_trainer(model: nnx.Module, weighting: losses.Weighting, rate: float = 1.0) -> Any:
    config = peft_trainer.TrainingConfig(eval_every_n_steps=100)
    return RankTunerTrainer(model, optax.sgd(rate), config, weighting=weighting)


@pytest.fixture
def batch(rows: Any) -> peft_trainer.TrainingInput:
    return peft_trainer.TrainingInput(input_tokens=rows.tokens, input_mask=rows.mask)


def dense_loss(
    model: nnx.Module, rows: Any, weighting: losses.Weighting
) -> tuple[jax.Array, losses.LossOutput]:
    inputs = model_input(peft_trainer.TrainingInput(rows.tokens, rows.mask))
    logits, _ = model(rows.tokens, inputs["positions"], None, inputs["attention_mask"])
    output = losses.weighted_nll(
        logits[:, :-1], jnp.asarray(rows.tokens[:, 1:]), rows.mask[:, 1:], weighting=weighting
    )
    return output.mean(), output


def test_one_step_takes_the_value_and_gradient_of_the_dense_loss(
    rows: Any, batch: Any, weighting: losses.Weighting, assert_close: Callable[..., None]
) -> None:
    model = make_model()
    before = parameters(model)
    reference = nnx.jit(nnx.value_and_grad(lambda m: dense_loss(m, rows, weighting), has_aux=True))
    (loss, output), gradient = reference(model)
    trainer = train(make_trainer(model, weighting), [batch])
    logged = {
        name: trainer.metrics_logger.get_metric("", name, "train")
        for name in ("loss", "ranktuner/nll", "ranktuner/weight/mean")
    }
    summary = losses.summarize(output)
    assert_close(
        logged,
        {
            "loss": loss,
            "ranktuner/nll": summary["nll"],
            "ranktuner/weight/mean": summary["weight/mean"],
        },
    )
    assert abs(loss / summary["nll"] - 1) > 0.01
    moved = jax.tree.map(np.subtract, before, parameters(model))
    assert_close(moved, nnx.to_pure_dict(gradient))


def test_accumulation_is_refused_with_what_to_set(weighting: losses.Weighting) -> None:
    config = peft_trainer.TrainingConfig(eval_every_n_steps=1, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2; set it to None"):
        RankTunerTrainer(make_model(), optax.sgd(1.0), config, weighting=weighting)


def test_tunixs_own_accumulation_differs_from_one_batch(rows: Any, batch: Any) -> None:
    """What the refusal is for. If this fails, Tunix accumulates sums: drop the refusal."""

    def moved(config: Any, batches: list[Any]) -> Any:
        model = make_model()
        train(peft_trainer.PeftTrainer(model, optax.sgd(1.0), config), batches)
        return parameters(model)["embedder"]["input_embedding"]

    whole = moved(peft_trainer.TrainingConfig(eval_every_n_steps=100), [batch])
    halves = [
        peft_trainer.TrainingInput(rows.tokens[part], rows.mask[part])
        for part in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4))
    ]
    config = peft_trainer.TrainingConfig(eval_every_n_steps=100, gradient_accumulation_steps=4)
    assert np.abs(whole - moved(config, halves)).max() > 1e-3


def test_three_steps_lower_the_nll_and_evaluation_stays_plain(
    batch: Any, weighting: losses.Weighting
) -> None:
    model = make_model()
    plain = peft_trainer.PeftTrainer(
        model, optax.sgd(0.1), peft_trainer.TrainingConfig(eval_every_n_steps=100)
    ).eval_loss_fn(model, **model_input(batch))
    trainer = train(make_trainer(model, weighting, 0.1), [batch] * 3, [batch])
    logger = trainer.metrics_logger
    np.testing.assert_allclose(logger.get_metric("", "loss", "eval"), plain, rtol=1e-5)
    np.testing.assert_allclose(
        logger.get_metric("", "perplexity", "eval"), np.exp(plain), rtol=1e-5
    )
    nll = logger.get_metric_history("", "ranktuner/nll", "train")
    np.testing.assert_allclose(nll[0], plain, rtol=1e-5)
    assert len(nll) == 3
    assert nll[2] < nll[1] < nll[0]


def test_the_example_learns(run_example: Callable[[str], list[float]]) -> None:
    nll = run_example("tunix_sft")
    assert nll[-1] < 0.5 * nll[0]
