"""Records to conversations, to tokens with a completion mask, to packed rows, to batches."""

from ranktuner_jax.data.batch import Batch
from ranktuner_jax.data.batches import BatchIterator
from ranktuner_jax.data.chat import ChatEncoder, TokenizedChat, turn_end_id
from ranktuner_jax.data.config import DataConfig
from ranktuner_jax.data.holdout import HOLDOUT
from ranktuner_jax.data.load import Example, check_sources, load_examples, load_rows
from ranktuner_jax.data.packing import best_fit
from ranktuner_jax.data.records import BadRowError, Conversation, to_conversation
from ranktuner_jax.data.rows import Rows
from ranktuner_jax.data.sources import Record, read_source
from ranktuner_jax.data.storage import write_dataset
from ranktuner_jax.data.summary import Summary
from ranktuner_jax.data.tokenizer import load_tokenizer

__all__ = [
    "HOLDOUT",
    "BadRowError",
    "Batch",
    "BatchIterator",
    "ChatEncoder",
    "Conversation",
    "DataConfig",
    "Example",
    "Record",
    "Rows",
    "Summary",
    "TokenizedChat",
    "best_fit",
    "check_sources",
    "load_examples",
    "load_rows",
    "load_tokenizer",
    "read_source",
    "to_conversation",
    "turn_end_id",
    "write_dataset",
]
