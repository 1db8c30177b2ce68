"""Multiple choice: ARC and GPQA, each by likelihood and by a written answer."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ranktuner_jax.evals.benchmarks.benchmark import Benchmark

__all__ = ["BENCHMARKS", "LETTERS"]

LETTERS = "ABCDEFGHIJ"
INSTRUCTION = (
    "Answer the following multiple choice question. Think step by step, and end with "
    "'The answer is (X)', where X is the letter of the right choice."
)

_GPQA_CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def _arc(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """Question, choices and the index of the right one, in the form of AI2 or of the hub.

    Labels are letters in most rows and digits in others, so what counts is the position.
    """
    question, choices = row["question"], row.get("choices")
    if isinstance(question, Mapping):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, Mapping):
        labels, texts = list(choices["label"]), list(choices["text"])
    else:
        labels = [choice["label"] for choice in choices or ()]
        texts = [choice["text"] for choice in choices or ()]
    return str(question), texts, labels.index(row["answerKey"])


def _gpqa(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """The same of GPQA, whose right answer comes first: shuffled by the question."""
    question = str(row["Question"]).strip()
    order = sorted(range(len(_GPQA_CHOICES)), key=functools.partial(_shuffled, question))
    choices = [str(row[_GPQA_CHOICES[i]]).strip() for i in order]
    return question, choices, order.index(0)


def _shuffled(question: str, index: int) -> bytes:
    return hashlib.sha256(f"{question}{index}".encode()).digest()


def _written(parts: tuple[str, Sequence[str], int]) -> str:
    question, choices, _ = parts
    listed = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, choices, strict=False))
    return f"{INSTRUCTION}\n\n{question}\n\n{listed}"


def _both(name: str, read: Any, **fields: Any) -> tuple[Benchmark, Benchmark]:
    """A benchmark whose answers are written, and one whose choices are compared by likelihood."""
    written = Benchmark(
        name=name,
        ask=lambda row: _written(read(row)),
        reference=lambda row: LETTERS[read(row)[2]],
        grader="choice",
        **fields,
    )
    by_likelihood = Benchmark(
        name=f"{name}_likelihood",
        ask=lambda row: f"Question: {read(row)[0]}\nAnswer:",
        choices=lambda row: [f" {choice}" for choice in read(row)[1]],
        reference=lambda row: read(row)[2],
        **fields,
    )
    return written, by_likelihood


BENCHMARKS = (
    *_both(
        "arc_challenge",
        _arc,
        file="arc_challenge_test.jsonl",
        source="hub:allenai/ai2_arc",
        subset="ARC-Challenge",
    ),
    *_both(
        "arc_easy",
        _arc,
        file="arc_easy_test.jsonl",
        source="hub:allenai/ai2_arc",
        subset="ARC-Easy",
    ),
    *_both(
        "gpqa",
        _gpqa,
        file="gpqa_diamond.jsonl",
        source="hub:Idavidrein/gpqa",
        subset="gpqa_diamond",
        split="train",
    ),
)
