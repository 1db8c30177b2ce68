"""README.md and docs/: the code runs as it stands, commands parse, keys and links exist."""

import argparse
import functools
import importlib
import json
import pathlib
import re
import shlex
from collections.abc import Iterator, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax.training import train_state

from ranktuner_jax import cli, evals, losses, models, train
from tests.train.conftest import tiny_model  # noqa: F401 (a fixture)

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = {name: path.read_text() for name, path in PAGES.items()}
EACH_PAGE = pytest.mark.parametrize("page", PAGES)

ROWS = [
    {"prompt": f"{a}+{b}", "completion": f"It is {a + b}", "answer": str(a + b)}
    for a in range(8)
    for b in range(8)
]
REGISTRIES: list[MutableMapping[str, Any]] = [
    losses.WEIGHTINGS,
    train.OPTIMIZERS,
    evals.TASKS,
    evals.BENCHMARKS,
    evals.GRADERS,
    models.FAMILIES,
]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.DOTALL)


def commands(bash: str) -> list[str]:
    """The calls of `ranktuner` in a block, one a line, without comments and redirections."""
    lines = [re.split("  #| >", line)[0].strip() for line in bash.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.removeprefix(".venv/bin/").startswith("ranktuner ")]


MY_CONFIG = blocks("extending.md", "python")[0]
COMMANDS = [call for page in PAGES for block in blocks(page, "bash") for call in commands(block)]


@pytest.fixture
def folder(
    tiny_model: pathlib.Path,  # noqa: F811
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[pathlib.Path]:
    """The current folder, with what the pages take for granted: model/, rows.jsonl and my.py."""
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "my.py").write_text(MY_CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKTUNER_CACHE", str(tmp_path / "cache"))
    before = [dict(registry) for registry in REGISTRIES]
    settings = {
        name: jax.config.values[name]
        for name in ("jax_compilation_cache_dir", "jax_disable_most_optimizations")
    }
    jax.config.update("jax_disable_most_optimizations", True)  # Compiling is most of the time.
    yield tmp_path
    for name, value in settings.items():
        jax.config.update(name, value)
    for registry, entries in zip(REGISTRIES, before, strict=True):
        for name in registry.keys() - entries.keys():
            del registry[name]


class Model(nn.Module):
    """Somebody's own model, the least of its kind: hidden states and an output layer apart."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        self.param("unembed", nn.initializers.normal(0.3), (13, 8))
        return nn.tanh(nn.Dense(8)(nn.Embed(13, 8)(tokens)))


def test_the_readmes_loss_trains_somebodys_own_model() -> None:
    [example] = blocks("README.md", "python")
    assert example.count("\n") <= 15
    model = Model()
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 13)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "mask": jnp.ones((2, 6), bool)}
    params = model.init(jax.random.key(1), batch["tokens"])["params"]
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(0.1))
    names = {"jax": jax, "model": model, "batch": batch, "state": state}
    for _ in range(10):
        exec(example, names)  # Each step takes the `state` of the one before.
        first = names.setdefault("first", names["metrics"])
    assert names["metrics"]["nll"] < 0.9 * first["nll"]


def test_the_start_pages_trainer_runs_as_it_stands(folder: pathlib.Path) -> None:
    [example] = blocks("start.md", "python")
    assert example.count("\n") <= 20
    names: dict[str, object] = {}
    exec(example, names)
    result = names["result"]
    assert isinstance(result, train.FitResult)
    assert result.steps == 20
    assert {"train/loss", "eval/nll"} <= result.metrics.keys()
    assert models.load_pretrained(folder / "runs/mine/model").config.num_layers == 2
    assert (folder / "runs/mine/model/tokenizer.json").exists()


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"README.md", "start.md", "extending.md"}))
def test_the_python_of_a_page_runs_from_top_to_bottom(page: str, folder: pathlib.Path) -> None:
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


def test_a_users_own_config_file_works_in_train_eval_export_and_python(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, *others = map(shlex.split, commands(blocks("extending.md", "bash")[0]))
    assert [words[1] for words in (trained, *others)] == ["train", "eval", "export"]
    assert cli.main(trained[1:]) == 0
    workdir = folder / "runs/focal"
    assert (workdir / "config.py").read_text() == MY_CONFIG
    # From here on there is the copy alone.
    (folder / "my.py").unlink()
    for words in others:
        del losses.WEIGHTINGS["focal"], train.OPTIMIZERS["sgd"], evals.TASKS["last_word"]
        assert cli.main(words[1:]) == 0, words
        assert "focal" in losses.WEIGHTINGS
    assert "answers right" in capsys.readouterr().out
    assert models.load_pretrained(folder / "exported").config.num_layers == 2

    (folder / "my.py").write_text(MY_CONFIG)
    names: dict[str, object] = {}
    for block in blocks("extending.md", "python")[1:]:
        exec(compile(block, "extending.md", "exec"), names)
    lines = (folder / "runs/hook/metrics.jsonl").read_text().splitlines()
    assert "train/largest_grad_norm" in json.loads(lines[-1])


@pytest.mark.parametrize("call", COMMANDS)
def test_a_command_takes_the_flags_and_keys_that_a_page_gives_it(
    call: str, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, *words = shlex.split(call)
    if "--help" in words:
        assert cli.main(words) == 0
        return
    name = next(n for n in (" ".join(words[:2]), words[0]) if n in cli.COMMANDS)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    importlib.import_module(cli.COMMANDS[name][0]).add_arguments(parser)
    args, overrides = parser.parse_known_args(words[len(name.split()) :])
    if hasattr(args, "overrides"):
        train.load_config(args.config or "own_data", overrides)
    else:
        assert overrides == []


@functools.cache
def keys() -> set[str]:
    return set(re.findall(r"--config\.([\w.]+)=", train.describe()))


@EACH_PAGE
def test_a_key_that_a_page_names_exists(page: str) -> None:
    """Such as `train.steps`; a name such as `train.Hook` is one of the package."""
    groups = "|".join({key.split(".")[0] for key in keys() if "." in key})
    for name in re.findall(rf"`(?:--config\.)?((?:{groups})\.[\w.]+)", TEXTS[page]):
        group, _, attribute = name.partition(".")
        if name in keys() or attribute == "options":
            continue
        assert hasattr(importlib.import_module(f"ranktuner_jax.{group}"), attribute.split(".")[0])


def anchors(text: str) -> set[str]:
    """The headings of a page as GitHub and MyST name them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EACH_PAGE
def test_every_relative_link_leads_to_a_file_and_a_heading(page: str) -> None:
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (PAGES[page].parent / path) if path else PAGES[page]
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@EACH_PAGE
def test_every_script_that_a_page_names_exists(page: str) -> None:
    for path in re.findall(r"(?:\./|bash )(launch/[\w.]+)", TEXTS[page]):
        assert (ROOT / path).exists(), path
