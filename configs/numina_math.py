r"""The paper's setup: one epoch of 39 steps on the first 10,000 rows of NuminaMath-CoT.

Paper: Yu et al., Probability-Entropy Calibration (RankTuner), arXiv:2602.01745.
Command: ranktuner train --config=numina_math --workdir=runs/numina
Data: rows have `messages`; the system prompt asks for \boxed{}. One conversation per row, as in
the paper, so that a batch has 256 conversations; --config.data.packing=true fits more per step.
Loss: the base weight is the label's probability, as in the paper for mathematics.
Optimizer: AdamW, 5e-5, cosine, warmup 0.1, betas (0.9, 0.95), weight decay 0.01, clip 1.0.
Expected: an independent reproduction with Qwen2.5-Math-7B reached 67.8 % on MATH-500 (mean of 16
samples); this config has not been run yet. Parameters and AdamW state take 91 GB in float32.
Needs `pip install 'ranktuner-jax[hub]'`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The keys that differ from the defaults of `ranktuner_jax.train.TrainConfig`."""
    return ConfigDict(
        {
            "model": "Qwen/Qwen2.5-Math-7B",
            "data": {
                "source": "hub:AI-MO/NuminaMath-CoT",
                "split": "train[:10000]",
                "system": "Please reason step by step, and put your final answer within \\boxed{}.",
                "row_length": 2048,
                "packing": False,
                "on_bad_row": "skip",
                "too_long": "truncate",
            },
            "loss": {"weighting": "ranktuner", "options": {"base": "prob", "scale": "bound"}},
            "optimizer": {"learning_rate": 5e-5},
            "train": {
                "epochs": 1.0,
                "batch_size": 256,
                "accumulation": 16,
                "remat": "full",
                "compute_dtype": "bfloat16",
            },
            "checkpoint": {"every_steps": 13},
            "eval": {"split": "test", "rows": 100},
        }
    )
