"""Your rows, any chat model: holds out a share of them by itself.

Paper: Yu et al., Probability-Entropy Calibration (RankTuner), arXiv:2602.01745 (the method).
Command: ranktuner train --config=own_data --workdir=runs/mine \
    --config.model=path/to/checkpoint --config.data.source=path/to/rows.jsonl
Data: a .jsonl or .parquet file, a folder that TFDS or `ranktuner data prepare` wrote, or
hub:owner/name. A row has `messages`, or `conversations` (ShareGPT), or one of the pairs
prompt/completion, problem/solution, question/answer, instruction/output; other columns are named
by data.prompt_column and data.completion_column. One prompt in 20 is kept out of training, with all
that was answered to it, and evaluated before and after; the run says how many. With a split of your
own: --config.data.holdout=0 --config.eval.split=test --config.data.source='rows_{split}.jsonl'.
Where held-out rows have a short `answer` (a number, a word), greedy completions are compared with
it.
What to change first: optimizer.learning_rate (1e-5 suits models of some billions of parameters,
1e-4 one of 135 million), train.epochs, and data.row_length, beyond which conversations are cut.
A model without a chat template: --config.data.chat_template=plain.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """What differs from the defaults of `ranktuner_jax.train.TrainConfig`."""
    return ConfigDict(
        {
            "model": "smollm2-135m",
            "data": {
                "source": "",
                "holdout": 0.05,
                "row_length": 512,
                "too_long": "truncate",
            },
            # As in the paper for general tasks; "prob" is its choice for mathematics, and ruins
            # models that are surely wrong: see smollm2_chain_sum.
            "loss": {"weighting": "ranktuner", "options": {"base": "one", "scale": "bound"}},
            "optimizer": {"learning_rate": 1e-5},
            "train": {
                "epochs": 3.0,
                "batch_size": 8,
                "remat": "full",
                "compute_dtype": "bfloat16",
            },
            # A save in the background needs a second copy of the state.
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
