r"""The paper's setup with adapters: Qwen2.5-Math-7B frozen in bfloat16, for one GPU.

Paper: Yu et al., Probability-Entropy Calibration (RankTuner), arXiv:2602.01745, which trains the
whole model; `numina_math` is that setup.
Command: ranktuner train --config=qwen25_math_7b_lora --workdir=runs/numina_lora
Data, loss, schedule and batch: those of `numina_math`, a row at a time.
Adapters: rank 16 on all projections of the layers, 40.4 million parameters; with AdamW's moments
0.48 GB in float32, which is what a checkpoint holds. The frozen model takes 15.2 GB.
Learning rate: four times that of `numina_math`; adapters need more than a whole model. Neither it
nor anything else here has been tried on this model yet.
Needs `pip install 'ranktuner-jax[hub]'`.
"""

from ml_collections import ConfigDict
from ranktuner_jax.configs import numina_math


def get_config() -> ConfigDict:
    """The keys that differ from the defaults of `ranktuner_jax.train.TrainConfig`."""
    config = numina_math.get_config()
    config.lora = ConfigDict({"rank": 16, "alpha": 32.0, "base": "bfloat16"})
    config.optimizer.learning_rate = 2e-4
    config.train.accumulation = config.train.batch_size
    return config
