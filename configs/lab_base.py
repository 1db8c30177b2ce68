"""A laboratory's base model, trained from random weights; `docs/lab.md` says on what.

Command: ranktuner lab --output=lab && ranktuner train --config=lab_base --workdir=lab/base
Data: lab/pretrain.jsonl, 20,000 conversations of 770 thousand tokens; the held-out questions are
lab/retention.jsonl, sums and stories whose numbers occur in no other file.
Strength: train.steps, at 1,024 tokens a step.
Hardware: 2 CPU cores at a load of 8 to 16 by other jobs, at the lowest priority: 13 minutes, five
evaluations included, at 870 to 3,450 tokens/s. It was not measured on idle cores.
Results of one run (seed 0), with 100 questions; those of fewer steps were measured on the way,
before the learning rate had decayed:

    steps   NLL of these texts   answers right
       0    5.320                  0 %
     200    0.676                  8 %
     400    0.549                 16 %
     600    0.383                 34 %
     800    0.289                 67 %
    1000    0.258                 83 % (95 % interval 74 to 89)

With numbers up to 99 instead of 30, 400 steps of 2,048 tokens gave 10.5 % (200 questions; 6.9 to
15.6).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The keys that differ from the defaults of `ranktuner_jax.train.TrainConfig`."""
    return ConfigDict(
        {
            "model": "lab/initial",
            "data": {"source": "lab/{split}.jsonl", "split": "pretrain", "row_length": 128},
            "loss": {"weighting": "sft"},
            "optimizer": {"name": "muon", "learning_rate": 1e-2, "warmup_ratio": 0.05},
            "train": {"steps": 1000, "batch_size": 8, "log_every": 50},
            "checkpoint": {"asynchronous": False},
            "eval": {
                "task": "number",
                "split": "retention",
                "rows": 100,
                "batch_size": 32,
                "examples": 200,
                "prompts_per_batch": 100,
                "max_new_tokens": 48,
            },
        }
    )
