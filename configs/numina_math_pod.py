r"""The paper's setup on a TPU slice of 64 chips or more: `numina_math` with a mesh for them.

Paper: Yu et al., Probability-Entropy Calibration (RankTuner), arXiv:2602.01745.
Command: ranktuner train --config=numina_math_pod --workdir=gs://BUCKET/runs/numina
Plan: ranktuner plan --config=numina_math_pod --topology=v5e:8x8
Model: Qwen2.5-Math-7B; --config.model=Qwen/Qwen3-8B for the paper's other one.
Mesh: four chips share their rows, the others divide the parameters: docs/planning.md shows why.
Data, loss and optimizer: those of numina_math.
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
                "accumulation": 4,
                "remat": "full",
                "compute_dtype": "bfloat16",
            },
            "mesh": {"data": 1, "fsdp": -1, "tensor": 4},
            "checkpoint": {"every_steps": 13},
            "eval": {"split": "test", "rows": 100},
        }
    )
