"""RankTuner in MaxText's supervised fine-tuning, on a small model of random weights.

python examples/trainers/maxtext_sft.py
"""

import pathlib
import tempfile

import jax
import numpy as np
import optax
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.trainers.post_train.sft import train_sft
from maxtext.utils.model_creation_utils import from_pretrained
from tunix.sft.peft_trainer import TrainingConfig

from ranktuner_jax.adapters.maxtext import use_ranktuner
from ranktuner_jax.losses import RankTuner

SMALL = "base_emb_dim=64 base_mlp_dim=128 base_num_decoder_layers=2 base_num_query_heads=4"
SMALL += " base_num_kv_heads=2 head_dim=16 vocab_size=256 max_target_length=75 dtype=float32"
SMALL += " model_name=default attention=dot_product num_vocab_tiling=2 log_config=False"
SMALL += " enable_checkpointing=False skip_jax_distributed_system=True run_name=example"


def main(steps: int = 30) -> list[float]:
    """Trains on one sentence; returns the plain NLL of each step."""
    sft = pathlib.Path(pyconfig.__file__).parent / "post_train" / "sft.yml"
    folder = f"base_output_directory={tempfile.mkdtemp()}"
    config = pyconfig.initialize_pydantic(["", str(sft), folder, *SMALL.split()])

    text = np.frombuffer(b"rank and expected rank, side by side. " * 16, np.uint8).astype(np.int32)
    rows = text.reshape(8, 76)
    position = np.repeat(np.arange(75, dtype=np.int32)[None], 8, axis=0)
    batch = {
        "inputs": rows[:, :-1],
        "inputs_position": position,
        "inputs_segmentation": np.ones_like(position),
        "targets": rows[:, 1:],
        "targets_position": position,
        "targets_segmentation": (position >= 9).astype(np.int32),  # 0: a prompt
    }

    # With checkpoints and data of MaxText: trainer, mesh = train_sft.setup_trainer_state(config)
    model, mesh = from_pretrained(config)
    options = TrainingConfig(eval_every_n_steps=steps)
    trainer = train_sft.MaxTextPeftTrainer(model, optax.adam(1e-2), options)
    train_sft.use_maxtext_loss_function(trainer, config)
    use_ranktuner(trainer, config, RankTuner("one"))
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        trainer.train([batch] * steps)
    curve = trainer.metrics_logger.get_metric_history("", "ranktuner/nll", "train")
    return [float(nll) for nll in curve]


if __name__ == "__main__":
    curve = main()
    print(f"nll {curve[0]:.3f} -> {curve[-1]:.3f}")
