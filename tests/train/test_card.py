"""The model card: metadata that the hub reads, the results with intervals, and the command."""

import dataclasses
import re
import shlex
from collections.abc import Callable

import huggingface_hub
import pytest

from ranktuner_jax import evals
from ranktuner_jax.train import TrainConfig, load_config, to_dict
from ranktuner_jax.train.saving.card import model_card


def command(card: str) -> list[str]:
    [text] = re.findall(r"```bash\n(.*?)\n```", card, re.DOTALL)
    return shlex.split(text)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("smollm2_chain_sum", ["--config.seed=3"]),
        ("own_data", ["--config.data.source=my rows.jsonl", "--config.loss.weighting=dft"]),
        ("own_data", ["--config.train.profile_steps=2,3", "--config.lora.rank=4"]),
        ("numina_math", ["--config.optimizer.name=muon", "--config.optimizer.options.beta=0.9"]),
    ],
)
def test_the_command_of_a_card_gives_the_config_again(name: str, overrides: list[str]) -> None:
    config = load_config(name, overrides)
    ranktuner, train, base, *flags, workdir = command(model_card(config, "runs/a b"))
    assert [ranktuner, train, workdir] == ["ranktuner", "train", "--workdir=runs/a b"]
    again = to_dict(load_config(base.removeprefix("--config="), flags))
    expected = to_dict(config)
    for where in ("mesh", "checkpoint", "telemetry"):  # They change no number of a model.
        del again[where], expected[where]
    assert again == expected


def test_a_card_has_metadata_for_the_hub_and_results_with_their_intervals() -> None:
    config = load_config("own_data", ["--config.model=owner/base", "--config.data.source=x.jsonl"])
    before = evals.EvalResult(nll=2.5, token_accuracy=0.25, tokens=1200, questions=30, correct=0)
    after = dataclasses.replace(before, nll=1.5, correct=15)
    text = model_card(config, "runs/x", 40, {"before": before, "after": after})
    metadata = huggingface_hub.ModelCard(text).data.to_dict()
    assert metadata["base_model"] == "owner/base"
    assert metadata["library_name"] == "transformers"
    assert "| steps | 40 |" in text
    assert "| token weights | ranktuner (base one, scale bound) |" in text
    assert "| plain NLL, nats a token | 2.500 | 1.500 |" in text
    # Agresti and Coull for 15 of 30, by hand: 0.5 ± 1.96 sqrt(0.25 / 33.84).
    assert "50.0% (33.2 to 66.8) |" in text
    assert "1,200 supervised tokens and 30 questions" in text
    assert "## Results" not in model_card(config, "runs/x", 20)


def test_the_card_of_a_users_own_config_names_the_copy_of_its_file(
    tiny_config: Callable[..., TrainConfig],
) -> None:
    card = model_card(tiny_config(train__steps=3, mesh__fsdp=2, mesh__data=4), "runs/x")
    expected = ["--config=config.py", "--config.train.steps=3", "--workdir=runs/x"]
    assert command(card)[2:] == expected
    assert "base_model" not in card  # A folder of this machine means nothing to the hub.
