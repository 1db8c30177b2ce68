"""SmolLM2-135M-Instruct on word problems with step-by-step solutions; takes about an hour.

Paper: Yu et al., Probability-Entropy Calibration (RankTuner), arXiv:2602.01745.
Command: ranktuner train --config=smollm2_gsm_symbolic --workdir=runs/gsm_symbolic
Data: `gsm_symbolic` of reasoning-gym; the templates of the held-out problems do not occur in
training. They probably derive from GSM8K's test split: do not report GSM8K scores afterwards.
Hardware: 2 CPU cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The keys that differ from the defaults of `ranktuner_jax.train.TrainConfig`."""
    return ConfigDict(
        {
            "model": "smollm2-135m",
            "data": {"source": "gsm_symbolic", "row_length": 512},
            "loss": {"weighting": "ranktuner", "options": {"base": "one", "scale": "bound"}},
            "optimizer": {"learning_rate": 1e-4},
            "train": {
                "steps": 100,
                "batch_size": 4,
                "remat": "full",
                "compute_dtype": "bfloat16",
            },
            "checkpoint": {"every_steps": 20, "asynchronous": False},
            "eval": {
                "task": "gsm_symbolic",
                "rows": 64,
                "batch_size": 4,
                "examples": 256,
                "prompts_per_batch": 64,
                "max_new_tokens": 256,
            },
        }
    )
