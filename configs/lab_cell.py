"""Fine-tunes a laboratory's base model on its target task; `docs/lab.md` says what that is.

Command: ranktuner train --config=lab_cell --workdir=lab/cell, after lab_base
Data: lab/train.jsonl, 512 conversations of 22 thousand tokens; the questions are lab/target.jsonl.
Another laboratory of the same seed, with other faults:
--config.data.source='lab_noisy/{split}.jsonl'.
Hardware: 2 CPU cores at a load of 8 to 16 by other jobs, at the lowest priority: 2 to 4 minutes,
about 50 s of CPU time. It was not measured on idle cores.
Results of SFT on rows without faults, with the base of 1,000 steps (seed 0, one run each, 200
questions):

    learning rate   NLL     answers right
    before          0.312    5.5 % (95 % interval 3.0 to 9.7)
    1e-3            0.271   17.5 % (12.8 to 23.4)
    2e-3            0.202   77.0 % (70.7 to 82.3)
    4e-3            0.186   78.0 % (71.7 to 83.2)

With --contradict=0.5: 2.5 % before, 5.0 % (2.7 to 9.0) after; 14.0 % (9.9 to 19.5) with a learning
rate of 3e-3 and 150 steps.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The keys that differ from the defaults of `ranktuner_jax.train.TrainConfig`."""
    return ConfigDict(
        {
            "model": "lab/base/model",
            "data": {"source": "lab/{split}.jsonl", "row_length": 128},
            "loss": {"weighting": "sft"},
            "optimizer": {"learning_rate": 2e-3},
            "train": {"steps": 60, "batch_size": 8, "log_every": 5},
            "checkpoint": {"asynchronous": False},
            "eval": {
                "task": "number",
                "split": "target",
                "rows": 100,
                "batch_size": 32,
                "examples": 200,
                "prompts_per_batch": 200,
                "max_new_tokens": 48,
            },
            "telemetry": {"tensorboard": False},
        }
    )
