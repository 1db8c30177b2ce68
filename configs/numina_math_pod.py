"""The paper's setup on a TPU slice of 64 chips or more: `numina_math` with a mesh for them.

Command: ranktuner train --config=numina_math_pod --workdir=gs://BUCKET/runs/numina
Plan: ranktuner plan --config=numina_math_pod --topology=v5e:8x8
Model: Qwen2.5-Math-7B; --config.model=Qwen/Qwen3-8B for the paper's other one.
Mesh: four chips share their rows, the others divide the parameters: docs/planning.md shows why.
Data, loss and optimizer: those of `numina_math`. It has not been run yet.
Needs `pip install 'ranktuner-jax[hub]'`.
"""

from ml_collections import ConfigDict
from ranktuner_jax.configs import numina_math


def get_config() -> ConfigDict:
    """The keys that differ from the defaults of `ranktuner_jax.train.TrainConfig`."""
    config = numina_math.get_config()
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 4})
    config.train.accumulation = 4
    return config
