"""SmolLM2-135M-Instruct on the training split of GSM8K, from the Hugging Face hub.

Paper: Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv:2110.14168 (the data);
Yu et al., Probability-Entropy Calibration (RankTuner), arXiv:2602.01745 (the method).
Command: ranktuner train --config=gsm8k --workdir=runs/gsm8k
Data: 7,473 conversations of 77 to 492 tokens, 1.37 million tokens in all, 51 % supervised; packed
into 1,366 rows of 1,024 tokens, 97.9 % full. Calculator annotations (<<48/2=24>>) are removed: a
model that writes them expects a calculator to complete them. Needs `pip install
'ranktuner-jax[hub]'`; for a machine without network access, run `ranktuner data prepare` elsewhere
and set --config.data.source to the folder.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The keys that differ from the defaults of `ranktuner_jax.train.TrainConfig`."""
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
