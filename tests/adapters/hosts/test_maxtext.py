"""RankTuner in MaxText: its trainer of supervised fine-tuning, on a tiny model of its own."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.trainers.post_train.sft import train_sft
from maxtext.utils import model_creation_utils
from tunix.sft import peft_trainer

from ranktuner_jax import losses
from ranktuner_jax.adapters.maxtext import use_ranktuner

CONFIG = pathlib.Path(pyconfig.__file__).parent / "post_train" / "sft.yml"


def make_config(path: Any, **options: Any) -> Any:
    given = {
        "run_name": "test",
        "base_output_directory": str(path),
        "enable_checkpointing": False,
        "skip_jax_distributed_system": True,
        "log_config": False,
        "model_name": "default",
        "dtype": "float32",
        "matmul_precision": "highest",
        "attention": "dot_product",
        "base_emb_dim": 16,
        "base_mlp_dim": 32,
        "base_num_decoder_layers": 2,
        "base_num_query_heads": 2,
        "base_num_kv_heads": 1,
        "head_dim": 8,
        "vocab_size": 61,
        "max_target_length": 16,
        "per_device_batch_size": 2,
        "dataset_type": "synthetic",
        "use_sft": True,
        **options,
    }
    return pyconfig.initialize_pydantic(["", str(CONFIG)], **given)


def make_trainer(config: Any, rate: float) -> Any:
    """What `setup_trainer_state` makes, without its data and its logs."""
    model, mesh = model_creation_utils.from_pretrained(config)
    trainer = train_sft.MaxTextPeftTrainer(
        model, optax.sgd(rate), peft_trainer.TrainingConfig(eval_every_n_steps=100)
    )
    return train_sft.use_maxtext_loss_function(trainer, config), mesh


def run(trainer: Any, mesh: Any, config: Any, batches: Any, evaluate_on: Any = None) -> Any:
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        trainer.train(batches, evaluate_on)
    return trainer.metrics_logger


def make_batch(rows: Any) -> dict[str, np.ndarray]:
    """MaxText's batch: the targets are the next tokens, and those of a prompt have no segment."""
    ones = np.ones((4, 16), np.int32)
    supervised = np.roll(rows.mask, -1, axis=1)
    supervised[:, -1] = False
    return {
        "inputs": rows.tokens,
        "inputs_position": np.arange(16, dtype=np.int32) * ones,
        "inputs_segmentation": ones,
        "targets": np.roll(rows.tokens, -1, axis=1),
        "targets_position": np.arange(16, dtype=np.int32) * ones,
        "targets_segmentation": supervised.astype(np.int32),
    }


def dense_loss(model: Any, batch: Any, weighting: losses.Weighting) -> Any:
    logits = model(
        decoder_input_tokens=batch["inputs"],
        decoder_positions=batch["inputs_position"],
        decoder_segment_ids=batch["inputs_segmentation"],
        enable_dropout=False,
    )
    output = losses.weighted_nll(
        logits,
        jnp.asarray(batch["targets"]),
        batch["targets_segmentation"] != 0,
        weighting=weighting,
    )
    return output.mean(), output


def parameters(model: nnx.Module) -> Any:
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


TIED = {"num_vocab_tiling": 2, "logits_via_embedding": True}


@pytest.mark.parametrize(
    ("options", "gradient_atol"),
    [
        ({}, 1e-5),
        ({"num_vocab_tiling": 2}, 1e-5),
        # MaxText rounds a tied table, and so its gradient, to bfloat16: by up to 2^-9.
        ({**TIED, "final_logits_soft_cap": 2.0, "normalize_embedding_logits": False}, 4e-3),
        ({**TIED, "normalize_embedding_logits": True}, 4e-3),
    ],
    ids=["dense", "fused", "fused-tied-capped", "fused-tied-normalized"],
)
def test_one_step_takes_the_value_and_gradient_of_the_dense_loss(
    rows: Any,
    weighting: losses.Weighting,
    assert_close: Callable[..., None],
    tmp_path: Any,
    options: dict[str, Any],
    gradient_atol: float,
) -> None:
    batch = make_batch(rows)
    config = make_config(tmp_path, **options)
    untiled = make_config(tmp_path, **{**options, "num_vocab_tiling": 1})
    reference, mesh = model_creation_utils.from_pretrained(untiled)
    with jax.set_mesh(mesh), logical_axis_rules(untiled.logical_axis_rules):
        (loss, output), gradient = nnx.jit(
            nnx.value_and_grad(lambda model: dense_loss(model, batch, weighting), has_aux=True)
        )(reference)
    trainer, mesh = make_trainer(config, 1.0)
    before = parameters(trainer.model)
    logger = run(use_ranktuner(trainer, config, weighting), mesh, config, [batch])
    moved = jax.tree.map(np.subtract, before, parameters(trainer.model))
    assert_close(moved, jax.tree.map(np.array, nnx.to_pure_dict(gradient)), gradient_atol)
    summary = losses.summarize(output)
    logged = {name: logger.get_metric("", f"ranktuner/{name}", "train") for name in summary}
    assert_close(logged, {name: np.asarray(value) for name, value in summary.items()})
    assert_close(logger.get_metric("", "loss", "train"), np.asarray(loss))
    assert abs(loss / summary["nll"] - 1) > 0.01


@pytest.mark.parametrize(
    ("name", "value"), [("gradient_accumulation_steps", 2), ("z_loss_multiplier", 1e-4)]
)
def test_what_only_maxtexts_loss_does_is_refused_with_what_to_set(
    name: str, value: Any, tmp_path: Any
) -> None:
    config = make_config(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=rf"{name}={value}; set {name}="):
        use_ranktuner(None, config)


def test_three_steps_lower_the_nll_and_evaluation_stays_plain(
    rows: Any, weighting: losses.Weighting, tmp_path: Any
) -> None:
    batch = make_batch(rows)
    config = make_config(tmp_path)
    trainer, mesh = make_trainer(config, 0.1)
    use_ranktuner(trainer, config, weighting)
    logger = run(trainer, mesh, config, [batch] * 3, [batch])
    nll = logger.get_metric_history("", "ranktuner/nll", "train")
    np.testing.assert_allclose(logger.get_metric("", "loss", "eval"), nll[0], rtol=1e-5)
    assert len(nll) == 3
    assert nll[2] < nll[1] < nll[0]


def test_the_example_learns(run_example: Callable[[str], list[float]]) -> None:
    nll = run_example("maxtext_sft")
    assert nll[-1] < 0.5 * nll[0]
