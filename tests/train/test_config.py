"""Configs: files, overrides, mistakes."""

import dataclasses
import json
import pathlib

import pytest

from ranktuner_jax import losses
from ranktuner_jax.errors import UserError
from ranktuner_jax.train import (
    CheckpointConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    StepConfig,
    config_names,
    describe,
    differences,
    load_config,
    read_config,
    to_dict,
)


@pytest.mark.parametrize("name", config_names())
def test_every_config_of_the_package_loads(name: str) -> None:
    assert load_config(name).train.steps >= 1


def test_overrides_of_every_type_are_read() -> None:
    config = load_config(
        "smollm2_chain_sum",
        [
            "--config.optimizer.learning_rate=1e-5",
            "--config.train.steps",
            "7",
            "--config.loss.options.clip=3",
            "--config.model=some/where",
        ],
    )
    assert config.optimizer.learning_rate == 1e-5
    assert config.train.steps == 7
    assert config.loss.make_weighting().clip == 3.0
    assert config.model == "some/where"


def test_steps_as_an_argument_take_the_place_of_the_files_epochs() -> None:
    assert load_config("gsm8k").train.epochs == 3.0
    train = load_config("gsm8k", ["--config.train.steps=7"]).train
    assert (train.steps, train.epochs) == (7, None)
    assert load_config("gsm8k", ["--config.train.epochs=0.5"]).train.epochs == 0.5
    with pytest.raises(UserError, match="expected one of them, got both"):
        load_config("gsm8k", ["--config.train.steps=7", "--config.train.epochs=0.5"])


def test_choosing_another_weighting_replaces_the_options() -> None:
    config = load_config(
        "smollm2_chain_sum",
        ["--config.loss.weighting=profit", "--config.loss.options.threshold=0.3"],
    )
    assert config.loss.make_weighting() == losses.ProFit(threshold=0.3)
    sft = load_config("smollm2_chain_sum", ["--config.loss.weighting=sft"])
    assert sft.loss.make_weighting() == losses.SFT()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.optimizer.lerning_rate=1", "unknown key .*did you mean optimizer.learning_rate"),
        ("--config.train.steps=many", "config.train.steps.*many"),
        ("--config.train.steps=1.5", "config.train.steps.*1.5"),
        ("--config.train.steps=0", "train.steps: expected at least 1, got 0"),
        ("--config.train.accumulation=3", "train.batch_size: expected a multiple"),
        ("--config.train.epochs=-1", "train.epochs: expected more than 0"),
        ("--config.train.param_dtype=float16", "train.param_dtype: expected one of"),
        ("--config.loss.weighting=ranktune", "did you mean ranktuner"),
        ("--config.loss.normalize=mean", "loss.normalize: expected one of tokens, weights"),
        ("--config.loss.options.base=two", "loss.options of ranktuner"),
        ("--config.loss.ramp_steps=-1", "loss.ramp_steps: expected at least 0"),
        ("--config.optimizer.schedule=step", "optimizer.schedule: expected one of cosine"),
        ("--config.optimizer.b1=1.0", r"optimizer.b1: expected a number in \[0, 1\), got 1.0"),
        ("--config.mesh.data=0", "mesh: expected sizes of at least 1"),
        ("--config.checkpoint.keep_last=0", "checkpoint.keep_last: expected at least 1"),
        ("--confg.seed=1", "expected --config.key=value, got .--confg.seed=1."),
        ("stray", "expected --config.key=value, got 'stray'"),
    ],
)
def test_a_wrong_override_is_reported(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load_config("smollm2_chain_sum", [argument])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2_chain_sun", "did you mean smollm2_chain_sum"),
        ("nowhere/config.py", "expected a Python file, found none at nowhere/config.py"),
    ],
)
def test_a_config_that_does_not_exist_is_reported(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(name)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("{'sed': 1}", "unknown key sed; did you mean seed"),
        ("{'train': {'step': 1}}", "unknown key train.step; did you mean steps"),
        ("{'train': {'steps': 'x'}}", "train.steps expected int, got 'x'"),
        ("{'train': 3}", "train is a group of keys, got 3"),
        ("{'loss': 3}", "loss is a group of keys, got 3"),
        ("{'loss': {'weighting': ['sft']}}", "loss.weighting: expected one of ranktuner"),
        ("3", r"expected get_config\(\) of .* to return a ConfigDict, got int"),
    ],
)
def test_a_wrong_key_in_a_config_file_is_reported(
    chosen: str, message: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"def get_config():\n    return {chosen}\n")
    with pytest.raises(UserError, match=message):
        load_config(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def get_config():\n    return {'seed' 3}\n",
            r"mine\.py:2: SyntaxError: .*, in `return \{'seed' 3\}`$",
        ),
        (
            "import no_such_package\n",
            r"mine\.py:1: ModuleNotFoundError: No module named 'no_such_package', in `import",
        ),
        (
            "import json\n\ndef get_config():\n    return json.loads('{')\n",
            r"mine\.py:4: JSONDecodeError: .*, in `return json\.loads\('\{'\)`$",
        ),
        ("get_config = 1 / 0\n", r"mine\.py:1: ZeroDivisionError: division by zero, in `get_conf"),
    ],
    ids=["syntax", "import", "raises in a library", "raises"],
)
def test_an_error_in_a_config_file_is_reported_with_its_line(
    text: str, message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine.py").write_text(text)
    with pytest.raises(UserError, match=f"^--config: {message}") as raised:
        load_config("mine.py")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "overrides", [["--config.data.holdout=0.1"], ["--config.eval.split=holdout"]]
)
def test_the_rows_held_out_must_be_those_evaluated(overrides: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"eval\.split: expected 'holdout' if and only if data\.holdout"
    ):
        load_config("smollm2_chain_sum", overrides)


def test_a_config_file_without_get_config_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("")
    with pytest.raises(UserError, match="defines no get_config"):
        load_config(str(path))


def test_an_option_that_the_weighting_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"ranktuner takes base, scale, clip, got 'bas'.*base"):
        LossConfig(weighting="ranktuner", options={"bas": "one"})


def test_a_config_is_read_back_from_its_workdir(tmp_path: pathlib.Path) -> None:
    config = load_config("smollm2_chain_sum", ["--config.loss.options.clip=3"])
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert read_config(tmp_path) == config


def test_a_workdir_without_a_run_is_reported(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="expected the config of a run at"):
        read_config(tmp_path)


def test_differences_name_keys_that_were_changed_added_or_removed() -> None:
    old = to_dict(load_config("smollm2_chain_sum"))
    new = to_dict(load_config("smollm2_chain_sum", ["--config.loss.weighting=sft"]))
    assert differences(old, old) == []
    assert "loss.weighting: 'ranktuner', now 'sft'" in differences(old, new)
    assert "loss.options.base: 'one', now 'absent'" in differences(old, new)


def test_every_key_has_a_description() -> None:
    lines = [line for line in describe().splitlines() if line.startswith("  --config.")]
    without_words = [line for line in lines if len(line.split(maxsplit=1)) < 2]
    assert without_words == []
    for group in (LossConfig, OptimizerConfig, StepConfig, MeshConfig, CheckpointConfig):
        for field in dataclasses.fields(group):
            assert any(f".{field.name}" in line for line in lines), field.name
    assert any(line.startswith("  --config.seed=") for line in lines)
    [weighting] = [line for line in lines if ".weighting=" in line]
    assert all(name in describe() for name in losses.WEIGHTINGS), weighting
