r"""QLoRA: Qwen3-8B frozen in 4 bits, for one GPU of 24 GB or more.

Papers: Dettmers et al., QLoRA, arXiv:2305.14314; the loss and the data are those of `numina_math`.
Command: ranktuner train --config=qwen3_8b_qlora --workdir=runs/numina_qlora
Data, loss, schedule and batch: those of `numina_math`, a row at a time.
Adapters: rank 16 on all projections of the layers, 43.6 million parameters; with AdamW's moments
0.52 GB in float32. The frozen model takes 6.4 GB: matrices of the layers in nf4, embedding and head
in bfloat16.
Learning rate: four times that of `numina_math`; neither it nor anything else here has been tried on
this model yet.
Needs `pip install 'ranktuner-jax[hub]'`.
"""

from ml_collections import ConfigDict
from ranktuner_jax.configs import qwen25_math_7b_lora


def get_config() -> ConfigDict:
    """The keys that differ from the defaults of `ranktuner_jax.train.TrainConfig`."""
    config = qwen25_math_7b_lora.get_config()
    config.model = "Qwen/Qwen3-8B"
    config.lora.base = "nf4"
    return config
