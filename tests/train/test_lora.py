"""Training adapters: the numbers of a step, what is saved, and what commands do with them."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.parquet as pq
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ranktuner_jax import cli, data, losses, models
from ranktuner_jax.compare.measure import Measurements
from ranktuner_jax.errors import UserError
from ranktuner_jax.train import (
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    Run,
    TrainConfig,
    TrainState,
    export,
    init_state,
    load_config,
    make_mesh,
    make_optimizer,
    make_train_step,
    place_batch,
    train_and_evaluate,
)
from ranktuner_jax.train.run import with_trained
from tests.tolerances import HF_LOGITS, SAME_RUN_LOSS, SAME_RUN_PARAM
from tests.train import processes
from tests.train.test_same_numbers import PACKED, VOCAB

MakeConfig = Callable[..., TrainConfig]

SHAPE = models.DecoderConfig(
    family="qwen2",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    qkv_bias=True,
    initializer_range=0.2,
)
KEYS: dict[str, Any] = {"lora__rank": 4, "lora__alpha": 8, "optimizer__learning_rate": 3e-2}
ARGUMENTS = [f"--config.{key.replace('__', '.')}={value}" for key, value in KEYS.items()]
LORA = models.Lora(rank=4, alpha=8.0)
ONE = MeshConfig(data=1)


def start(
    lora: models.Lora | None, tx: optax.GradientTransformation, mesh: MeshConfig = ONE
) -> tuple[TrainState, Callable[[int, TrainState], Any], jax.stages.Wrapped, Any]:
    """A state, the step of it that takes a batch by its number, and the compiled step itself."""
    devices = jax.devices()[: math.prod(dataclasses.astuple(mesh))]
    grid = make_mesh(mesh, devices)
    shape = dataclasses.replace(SHAPE, vocab_multiple=mesh.tensor)
    model = models.Decoder(shape, rngs=nnx.Rngs(0), mesh=grid)
    if lora is not None:
        models.add_adapters(model, lora, rngs=nnx.Rngs(1))
    state = init_state(model, tx, grid)
    step = make_train_step(state, grid, weighting=losses.RankTuner("one"))

    def take(number: int, state: TrainState) -> Any:
        return step(state, place_batch(grid, data.Batch.of(PACKED[number]), 1))

    return state, take, step, place_batch(grid, data.Batch.of(PACKED[0]), 1)


def by_name(state: Any) -> dict[str, np.ndarray]:
    return {str(path[-1]): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def test_the_first_loss_is_that_of_the_base_and_the_head_takes_two_matmuls() -> None:
    losses_, matmuls = [], []
    for lora in (None, LORA):
        state, take, step, batch = start(lora, optax.sgd(0.1))
        text = step.lower(state, batch).compile().as_text()
        assert text is not None
        # Those of the loss, in its loop over whole chunks.
        dots = [line for line in text.splitlines() if " dot(" in line]
        matmuls.append(sum("chunks_of_96" in line for line in dots))
        losses_.append(float(take(0, state)[1]["loss"]))
    assert losses_[0] == losses_[1]
    assert matmuls == [3, 2]


def test_below_an_identity_training_b_is_training_the_matrices() -> None:
    # Those whose inputs are the hidden state: A is then square.
    names = ("q", "k", "v", "gate", "up")
    lora = models.Lora(rank=SHAPE.hidden_size, alpha=SHAPE.hidden_size, targets=names)

    def only(trained: tuple[str, ...]) -> optax.GradientTransformation:
        def label(path: tuple[Any, ...], _: Any) -> str:
            keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            return "trained" if keys[-1] in trained else "kept"

        return optax.partition(
            {"trained": optax.adam(1e-2), "kept": optax.set_to_zero()},
            lambda params: jax.tree_util.tree_map_with_path(label, params),
        )

    whole, step_whole, *_ = start(None, only(names))
    state, step, *_ = start(lora, only(tuple(f"{name}_lora_b" for name in names)))
    for name in names:
        a = state.params["layers"][f"{name}_lora_a"]
        eye = jnp.eye(SHAPE.hidden_size).reshape(1, *a.shape[1:])
        a.set_value(jax.device_put(jnp.broadcast_to(eye, a.shape), a.get_value().sharding))
    first = by_name(whole.params)
    for number in range(5):
        whole, whole_metrics = step_whole(number, whole)
        state, metrics = step(number, state)
        np.testing.assert_allclose(metrics["loss"], whole_metrics["loss"], **SAME_RUN_LOSS)
        moved, b = by_name(whole.params), by_name(state.params)
        for name in names:
            change = (moved[name] - first[name]).reshape(b[f"{name}_lora_b"].shape)
            largest = np.abs(change).max()
            assert largest > 5e-3
            np.testing.assert_allclose(
                b[f"{name}_lora_b"] / largest, change / largest, rtol=0, atol=1e-3, err_msg=name
            )


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str
)
def test_ten_steps_are_the_same_on_any_mesh(mesh: MeshConfig) -> None:
    results = []
    for where in (ONE, mesh):
        state, take, *_ = start(
            dataclasses.replace(LORA, dropout=0.2),
            make_optimizer(OptimizerConfig(learning_rate=2e-3), 10),
            where,
        )
        # Not from zero, where A's first gradients are zero and the next ones nearly so: Adam would
        # enlarge their rounding.
        for key, name in enumerate(LORA.targets):
            b = state.params["layers"][f"{name}_lora_b"]
            random = 0.1 * jax.random.normal(jax.random.key(key), b.shape)
            b.set_value(jax.device_put(random, b.get_value().sharding))
        frozen = by_name(state.base)
        log = []
        for number in [*range(9), 0]:
            state, metrics = take(number, state)
            log.append(float(metrics["loss"]))
        for name, value in by_name(state.base).items():
            np.testing.assert_array_equal(value, frozen[name])
        results.append((log, by_name(state.params)))
    (one, params), (other, divided) = results
    assert one[-1] < one[0] - 0.05  # On the same batch.
    np.testing.assert_allclose(other, one, **SAME_RUN_LOSS)
    for name, value in params.items():
        largest = np.abs(value).max()
        np.testing.assert_allclose(divided[name] / largest, value / largest, **SAME_RUN_PARAM)


def test_muon_trains_both_factors_as_matrices() -> None:
    tx = make_optimizer(OptimizerConfig(name="muon", learning_rate=1e-2), 3)
    state, take, *_ = start(LORA, tx)
    before = by_name(state.params)
    for number in range(2):
        state, _ = take(number, state)
    for name, value in by_name(state.params).items():
        change = (value - before[name])[0]
        rows = LORA.rank if name.endswith("_a") else change.size // LORA.rank
        sizes = np.linalg.svd(change.reshape(rows, -1), compute_uv=False)
        assert sizes[-1] > 0.1 * sizes[0], name  # AdamW's changes have a low rank at first.


@pytest.fixture(scope="module")
def make(tiny_config: MakeConfig) -> MakeConfig:
    """Makes the tiny config, with adapters."""

    def config(**overrides: object) -> TrainConfig:
        return tiny_config(**KEYS | overrides)

    return config


@pytest.fixture(scope="module")
def finished(make: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("lora")
    train_and_evaluate(make(), workdir)
    return workdir


def factors(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = load_file(workdir / "model" / "adapter_model.safetensors")
    return tensors


def test_a_run_saves_adapters_and_nothing_of_the_base(
    finished: pathlib.Path, tiny_model: pathlib.Path
) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["after"]["nll"] < result["before"]["nll"] - 0.01
    names = {path.name for path in (finished / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    options = json.loads((finished / "model" / "adapter_config.json").read_text())
    assert options["base_model_name_or_path"] == str(tiny_model)
    metadata = json.loads((finished / "checkpoints" / "6" / "run" / "metadata").read_text())
    sizes = {
        name: math.prod(map(int, re.findall(r"\d+", shape.split("(")[1])))
        for name, shape in metadata["shapes"].items()
    }
    params = {name: size for name, size in sizes.items() if name.startswith("params.")}
    assert len(params) == 14
    assert all("_lora_" in name for name in params)
    # The adapters, and Adam's two moments of them.
    assert sum(sizes.values()) - 3 * sum(params.values()) < 8


@pytest.mark.drill
def test_a_run_that_was_killed_resumes_to_the_same_bits(
    finished: pathlib.Path, make: MakeConfig, tiny_config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = [sys.executable, "-m", "ranktuner_jax.cli", "train", f"--config={tiny_config_file}"]
    process = subprocess.Popen(
        [*command, *ARGUMENTS, f"--workdir={tmp_path}"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "2").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    train_and_evaluate(make(), tmp_path)
    assert factors(tmp_path).keys() == factors(finished).keys()
    for name, value in factors(finished).items():
        np.testing.assert_array_equal(factors(tmp_path)[name], value)


@pytest.mark.drill  # The same programs and saving run in one process; whole models in two.
def test_two_processes_train_the_same_adapters(
    finished: pathlib.Path, tiny_config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = [f"--config={tiny_config_file}", "--config.eval.task=", f"--workdir={tmp_path}"]
    ended = processes.wait(processes.start([*command, *ARGUMENTS]), timeout=300)
    assert [code for code, _ in ended] == [0, 0], ended
    for name, value in factors(finished).items():
        largest = np.abs(value).max()
        np.testing.assert_allclose(
            factors(tmp_path)[name] / largest, value / largest, **SAME_RUN_PARAM, err_msg=name
        )


def test_another_base_is_refused(
    make: MakeConfig, tiny_model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "base")
    run = Run.open(make(model=tmp_path / "base", checkpoint__every_steps=0), workdir=tmp_path / "w")
    run.trainer().fit(run.rows, 1, batch_size=8)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    again = Run.open(tmp_path / "w").trainer()
    with pytest.raises(UserError, match="were trained on another base model than the one that con"):
        again.resume()
    with pytest.raises(UserError, match="were trained on another base model"):
        export(tmp_path / "w", tmp_path / "merged", merge=True)
    export(tmp_path / "w", tmp_path / "adapter")  # The base is not read.


def test_an_exported_adapter_and_the_merged_model_compute_the_same(
    finished: pathlib.Path, tiny_model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert cli.main(["export", f"--workdir={finished}", f"--output={tmp_path / 'adapter'}"]) == 0
    for path in (finished / "model").iterdir():
        assert (tmp_path / "adapter" / path.name).read_bytes() == path.read_bytes()
    command = ["export", f"--workdir={finished}", "--merge", f"--output={tmp_path / 'merged'}"]
    assert cli.main(command) == 0
    tokens = jnp.arange(3, 99).reshape(2, 48)
    adapted = models.load_pretrained(tiny_model)
    models.load_adapter(adapted, tmp_path / "adapter")
    merged = models.load_pretrained(tmp_path / "merged")
    one, other = (
        np.asarray(jax.jit(lambda tokens, m=model: m.logits(m(tokens)))(tokens))
        for model in (adapted, merged)
    )
    np.testing.assert_allclose(other, one, **HF_LOGITS)


def test_eval_and_audit_take_an_adapter(
    finished: pathlib.Path,
    tiny_config_file: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    after = json.loads((finished / "result.json").read_text())["after"]
    adapter = f"--adapter={finished / 'model'}"
    for where in ([f"--workdir={finished}"], [f"--config={tiny_config_file}", adapter]):
        assert cli.main(["eval", *where, "--config.eval.task=", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["nll"] == pytest.approx(after["nll"], rel=1e-5)
    output = tmp_path / "audit"
    command = ["audit", f"--config={tiny_config_file}", adapter, f"--output={output}"]
    assert cli.main([*command, "--split=test"]) == 0
    nll = pq.read_table(output / "tokens.parquet")["nll"].to_numpy()
    assert nll.mean() == pytest.approx(after["nll"], rel=1e-4)
    about = json.loads((output / "audit.json").read_text())
    assert str(finished / "model") in json.dumps(about)
    without = [argument for argument in command if argument != adapter]
    assert cli.main([*without, "--split=test"]) == 2  # Another model's audit is there.
    capsys.readouterr()
    for arguments in (["audit", f"--output={tmp_path / 'no'}"], ["eval"]):
        where = [f"--config={tiny_config_file}", f"--adapter={tmp_path}"]
        assert cli.main([*arguments, *where]) == 2
        assert "lora.adapter: expected PEFT's folder, found no" in capsys.readouterr().err


def test_a_comparison_measures_the_base_with_its_adapter(
    finished: pathlib.Path, make: MakeConfig, sums: str, tmp_path: pathlib.Path
) -> None:
    after = json.loads((finished / "result.json").read_text())["after"]
    measure = Measurements(retain=sums.format(split="test"))
    trained = with_trained(make(), finished / "model")
    _, retention = measure._of_model(trained, tmp_path)
    assert retention["retention_nll"] == pytest.approx(after["nll"], rel=1e-5)
    whole = with_trained(make(), tmp_path)
    assert (whole.model, whole.lora) == (str(tmp_path), LoraConfig())


def test_training_goes_on_from_an_adapter(finished: pathlib.Path, tiny_config: MakeConfig) -> None:
    run = Run.open(tiny_config(lora__adapter=finished / "model", lora__base="bfloat16"))
    assert run.model.layers.lora == models.Lora(rank=4, alpha=8.0)
    found = by_name(nnx.state(run.model, nnx.Param))
    one = factors(finished)["base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"]
    np.testing.assert_array_equal(found["o_lora_b"][1], one)
    assert np.abs(one).max() > 0
    assert run.model.unembed.dtype == jnp.bfloat16


def test_a_run_on_a_quantised_base_resumes_and_is_merged_into_the_whole_one(
    make: MakeConfig, tiny_model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shape = dataclasses.replace(
        models.read_config(tiny_model),
        hidden_size=64,
        intermediate_size=64,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
    )
    base = tmp_path / "base"
    models.save_pretrained(models.Decoder(shape, rngs=nnx.Rngs(0)), base, tokenizer_from=tiny_model)
    keys = {
        "lora__base": "nf4",
        "lora__targets": "all,embed,head",
        "lora__dropout": 0.2,
        "checkpoint__every_steps": 0,
    }
    config = make(model=base, **keys)
    trained = []
    for workdir, resumed, steps in (
        (None, 0, 3),
        (tmp_path / "run", 0, 2),
        (tmp_path / "run", 2, 3),
    ):
        run = Run.open(config, workdir=workdir)
        trainer = run.trainer()
        if resumed:
            assert trainer.resume() == resumed  # The base has the same checksum.
        trainer.fit(run.rows, steps, batch_size=8)
        trained.append(by_name(nnx.state(trainer.model, nnx.Param)))
    assert trainer.model.unembed.dtype == jnp.bfloat16
    layers: Any = trainer.model.layers
    assert layers.up.get_value().codes.dtype == jnp.uint8
    for name, value in trained[0].items():  # Of the same bits, with the same dropout.
        np.testing.assert_array_equal(value, trained[2][name])
    assert np.abs(trained[0]["up_lora_b"] - trained[1]["up_lora_b"]).max() > 0
    export(tmp_path / "run", tmp_path / "merged", merge=True)
    export(tmp_path / "run", tmp_path / "adapter")
    name = "model.layers.1.mlp.up_proj"
    before, merged = (
        load_file(folder / "model.safetensors")[f"{name}.weight"].astype(np.float32)
        for folder in (base, tmp_path / "merged")
    )
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    assert np.abs(b).max() > 0
    # To bfloat16, twice; nf4 is off by a tenth of the largest.
    expected = before + KEYS["lora__alpha"] / KEYS["lora__rank"] * b @ a
    np.testing.assert_allclose(merged, expected, rtol=0, atol=2**-8 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rank=-1"], "lora.rank: expected at least 0, got -1"),
        (["rank=4", "adapter=x"], "lora.rank: expected 0 with lora.adapter, .* got 4"),
        (["base=bfloat16"], "lora.base: expected a frozen model, got bfloat16 with lora.rank=0"),
        (["rank=4", "base=int3"], "lora.base: expected one of .*, got 'int3'"),
        (["base=nf4"], "lora.base: expected a frozen model, got nf4 with lora.rank=0"),
        (["rank=4", "targets=q,w"], "lora.targets: expected all, or names .*, got 'w'"),
    ],
    ids=str,
)
def test_keys_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("smollm2_chain_sum", [f"--config.lora.{key}" for key in overrides])


def test_only_adapters_can_be_merged(
    tiny_config: MakeConfig, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Run.open(tiny_config(), workdir=tmp_path / "run").claim()
    command = ["export", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'x'}", "--merge"]
    assert cli.main(command) == 2
    assert "--merge: expected a run with adapters" in capsys.readouterr().err
