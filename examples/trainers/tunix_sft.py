"""RankTuner in Tunix's `PeftTrainer`, on a small Qwen3 of random weights.

python examples/trainers/tunix_sft.py
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.sft import peft_trainer, utils

from ranktuner_jax.adapters.tunix import RankTunerTrainer
from ranktuner_jax.losses import RankTuner


def model_input(batch):
    """Tunix's arguments of a model; the attention mask shows prompts, too."""
    present = jnp.ones_like(batch.input_mask)
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,  # the completion: what is supervised
        "positions": utils.build_positions_from_mask(present),
        "attention_mask": utils.make_causal_attn_mask(present),
    }


def main(steps: int = 30) -> list[float]:
    """Trains on one sentence; returns the plain NLL of each step."""
    text = np.frombuffer(b"rank and expected rank, side by side. " * 8, np.uint8)
    tokens = text[:304].reshape(4, 76).astype(np.int32)
    batch = peft_trainer.TrainingInput(tokens, np.arange(76)[None] >= [[10]] * 4)
    config = qwen3.ModelConfig(
        num_layers=2,
        vocab_size=256,
        embed_dim=64,
        hidden_dim=128,
        num_heads=4,
        head_dim=16,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    trainer = RankTunerTrainer(
        qwen3.Qwen3(config, rngs=nnx.Rngs(0)),
        optax.adam(1e-2),
        peft_trainer.TrainingConfig(eval_every_n_steps=steps),
        weighting=RankTuner("one"),
    )
    trainer.with_gen_model_input_fn(model_input).train([batch] * steps)
    logged = trainer.metrics_logger.get_metric_history("", "ranktuner/nll", "train")
    return [float(nll) for nll in logged]


if __name__ == "__main__":
    curve = main()
    print(f"nll {curve[0]:.3f} -> {curve[-1]:.3f}")
