"""SmolLM2-135M-Instruct on GSM8K's own training problems, from the Hugging Face hub.

Paper: Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv:2110.14168 (the data);
Yu et al., Probability-Entropy Calibration (RankTuner), arXiv:2602.01745 (the method).
Command: ranktuner train --config=gsm8k --workdir=runs/gsm8k
Data: 7,473 conversations of 77 to 492 tokens, 1.37 million tokens in all, 51 % supervised; they
fill 97.9 % of 1,366 rows of 1,024. The calculator's marks (<<48/2=24>>) are removed: a model that
writes them expects an answer. Needs `pip install 'ranktuner-jax[hub]'`; without a network, prepare
it once elsewhere with `ranktuner data prepare` and set --config.data.source to the folder.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """What differs from the defaults of `ranktuner_jax.train.TrainConfig`."""
    return ConfigDict(
        {
            "model": "smollm2-135m",
            "data": {
                "source": "hub:openai/gsm8k",
                "subset": "main",
                "strip_calculator_marks": True,
                "row_length": 1024,
            },
            "loss": {"weighting": "ranktuner", "options": {"base": "one", "scale": "bound"}},
            "optimizer": {"learning_rate": 5e-5},
            "train": {"epochs": 3.0, "batch_size": 16, "remat": "full"},
            "checkpoint": {"every_steps": 50},
            "eval": {"split": "test", "rows": 256},
        }
    )
