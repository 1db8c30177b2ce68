"""Your own data with any chat model; part of the data is held out automatically.

Paper: Yu et al., Probability-Entropy Calibration (RankTuner), arXiv:2602.01745 (the method).
Command: ranktuner train --config=own_data --workdir=runs/mine \
    --config.model=path/to/checkpoint --config.data.source=path/to/rows.jsonl
Data: a .jsonl or .parquet file, a folder that TFDS or `ranktuner data prepare` wrote, or
hub:owner/name. A row has `messages`, or `conversations` (ShareGPT), or one of the pairs
prompt/completion, problem/solution, question/answer, instruction/output; set
data.prompt_column and data.completion_column for other names. One prompt in 20 is held out, with
all of its completions, and evaluated before and after training; the run prints how many. To use
your own test split: --config.data.holdout=0 --config.eval.split=test
--config.data.source='rows_{split}.jsonl'. If held-out rows have a short `answer` (a number, a
word), greedy completions are compared with it.
Change first: optimizer.learning_rate (1e-5 suits models with billions of parameters, 1e-4 one with
135 million), train.epochs, and data.row_length, beyond which conversations are truncated. For a
model without a chat template: --config.data.chat_template=plain.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The keys that differ from the defaults of `ranktuner_jax.train.TrainConfig`."""
    return ConfigDict(
        {
            "model": "smollm2-135m",
            "data": {
                "source": "",
                "holdout": 0.05,
                "row_length": 512,
                "too_long": "truncate",
            },
            # The paper's choice for general tasks. Its choice for mathematics, "prob", ruins models
            # that are confidently wrong: see smollm2_chain_sum.
            "loss": {"weighting": "ranktuner", "options": {"base": "one", "scale": "bound"}},
            "optimizer": {"learning_rate": 1e-5},
            "train": {
                "epochs": 3.0,
                "batch_size": 8,
                "remat": "full",
                "compute_dtype": "bfloat16",
            },
            # Asynchronous saves need memory for a second copy of the state.
            "checkpoint": {"every_steps": 50, "asynchronous": False},
            "eval": {
                "task": "auto",
                "split": "holdout",
                "rows": 256,
                "batch_size": 8,
                "examples": 64,
                "max_new_tokens": 256,
            },
        }
    )
