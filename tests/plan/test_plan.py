"""A plan says what the real step needs."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from ranktuner_jax import cli, models
from ranktuner_jax.errors import UserError
from ranktuner_jax.plan import make_plan, tables, topologies
from ranktuner_jax.plan.chips import Chip
from ranktuner_jax.plan.collectives import Collective
from ranktuner_jax.plan.program import compile_step, read_model
from ranktuner_jax.plan.roofline import roofline
from ranktuner_jax.train import TrainConfig, Trainer, load_config, make_mesh, make_optimizer
from ranktuner_jax.train.step.schedules import make_schedule

SHAPE = ["--config.data.row_length=128", "--config.train.batch_size=16"]
MESH = ["--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2"]


def config_of(folder: pathlib.Path, *keys: str) -> TrainConfig:
    return load_config("smollm2_chain_sum", [f"--config.model={folder}", *SHAPE, *keys])


def test_a_plan_has_the_memory_of_the_step_that_training_runs(folder: pathlib.Path) -> None:
    accumulation = 2
    config = config_of(folder, *MESH, f"--config.train.accumulation={accumulation}")
    plan = make_plan(config, "cpu:8")

    mesh = make_mesh(config.mesh)
    decoder = models.read_config(folder)
    model = models.Decoder(
        decoder,
        rngs=nnx.Rngs(0),
        dtype=config.train.compute_dtype,
        remat=config.train.remat,
        mesh=mesh,
    )
    trainer = Trainer(
        model,
        tx=make_optimizer(config.optimizer, config.train.steps),
        mesh=mesh,
        accumulation=accumulation,
        clip_norm=config.optimizer.clip_norm,
        weighting=config.loss.make_weighting(),
        schedule=make_schedule(config.optimizer, config.train.steps),
    )
    tokens = np.ones((16, 128), np.int32)
    trainer.step({"tokens": tokens, "labels": tokens, "mask": tokens > 0})
    assert plan.memory_gb["total"] == trainer.step_memory_gb


def test_kinds_of_memory_are_those_of_one_device(folder: pathlib.Path) -> None:
    plan = make_plan(config_of(folder, *MESH), "cpu:8")
    config = models.read_config(folder)
    layer = 64 * (4 + 2 + 2 + 4) * 16 + 3 * 64 * 192
    matrices = config.num_layers * layer + 2 * 512 * 64
    norms = (2 * config.num_layers + 1) * 64
    memory = plan.memory_gb
    assert memory["parameters"] == pytest.approx(4 * (matrices / 8 + norms) / 1e9)
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=1e-3)
    kinds = ("parameters", "optimizer", "gradients", "activations", "loss", "other")
    assert memory["total"] == pytest.approx(sum(memory[kind] for kind in kinds))


def test_flops_are_those_of_the_model_and_its_recomputation(folder: pathlib.Path) -> None:
    whole = ["--config.mesh.data=1"]
    kept = make_plan(config_of(folder, *whole, "--config.train.remat=none"), "cpu:1").roofline
    full = make_plan(config_of(folder, *whole, "--config.train.remat=full"), "cpu:1").roofline
    tokens = 16 * 128
    layers = 3 * (64 * (4 + 2 + 2 + 4) * 16 + 3 * 64 * 192)
    # Without a kernel all pairs of tokens are multiplied, also those that the mask excludes.
    attention = 3 * 2 * 16 * 128**2 * 4 * 16
    assert kept.flops == pytest.approx(6 * tokens * (layers + 512 * 64) + 6 * attention, rel=0.01)
    # Recomputed are all products of a layer but the last.
    again = 2 * tokens * (layers - 3 * 64 * 192) + 2 * attention
    assert full.flops - kept.flops == pytest.approx(again, rel=0.05)
    assert full.model_flops == kept.model_flops < kept.flops


FSDP = ["--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.train.compute_dtype=float32"]


def test_fsdp_holds_no_more_than_a_layer_of_any_stack(folder: pathlib.Path) -> None:
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # With five layers no array but a stack has the size of one, whatever XLA makes of shapes.
    (folder / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 5}))
    config = config_of(folder, *FSDP, "--config.train.accumulation=2")
    step = compile_step(config, read_model(config), topologies.devices("cpu:8"))
    shapes = [leaf.shape for leaf in jax.tree.leaves(step.state.params) if leaf.ndim > 2]
    held = {array.size for _, one, _ in step.program().located() for array in one.arrays}
    assert len(shapes) == 7
    assert all(math.prod(shape[1:]) in held for shape in shapes)  # A layer is gathered whole.
    assert not any(math.prod(shape) in held for shape in shapes)


def test_fsdp_gathers_each_layer_twice_and_sums_each_gradient_once(folder: pathlib.Path) -> None:
    plan = make_plan(config_of(folder, *FSDP), "cpu:8")
    layers = 3 * (64 * (4 + 2 + 2 + 4) * 16 + 3 * 64 * 192)
    embeddings = 2 * 512 * 64
    sent = {one.kind: one.num_bytes for one in plan.collectives if one.axes == ("fsdp",)}
    # The loss computes the head's gradient with its value, and the lookup needs no second gather.
    assert sent["all-gather"] == pytest.approx(4 * (2 * layers + embeddings) * 7 / 8, rel=0.01)
    # XLA:CPU scatters some sums, and reduces the others whole, which sends twice as much.
    summed = sent["reduce-scatter"] + sent["all-reduce"] / 2
    assert summed == pytest.approx(4 * (layers + embeddings) * 7 / 8, rel=0.01)


def test_the_plain_loss_needs_as_much(folder: pathlib.Path) -> None:
    ours = make_plan(config_of(folder, *MESH), "cpu:8")
    plain = make_plan(config_of(folder, *MESH, "--config.loss.weighting=sft"), "cpu:8")
    assert ours.memory_gb["total"] <= 1.02 * plain.memory_gb["total"]
    assert ours.roofline.flops == plain.roofline.flops
    assert sum(one.num_bytes for one in ours.collectives) == pytest.approx(
        sum(one.num_bytes for one in plain.collectives), rel=1e-3
    )


def test_no_array_has_all_tokens_and_the_whole_vocabulary(folder: pathlib.Path) -> None:
    keys = ["--config.loss.chunk_size=64", "--config.mesh.data=1", "--config.data.row_length=64"]
    plan = make_plan(config_of(folder, *keys), "cpu:1")
    largest = max(
        math.prod(map(int, re.findall(r"\d+", a.type.partition("[")[2]))) for a in plan.arrays
    )
    assert largest < 16 * 64 * 512
    assert any(array.source.startswith("models/") for array in plan.arrays)


def test_the_command_prints_one_object(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(
        ["plan", "--topology=cpu:8", "--json", f"--config.model={folder}", *SHAPE, *MESH]
    )
    plan = json.loads(capsys.readouterr().out)
    assert (code, plan["fits"]) == (0, True)
    assert plan["step_seconds"][0] < plan["step_seconds"][1] <= 1.6 * plan["step_seconds"][0]
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert {"total", "parameters", "loss"} <= set(plan["memory_gb"])
    assert set(plan["collective_gb"]) >= {"all-gather", "all-reduce"}
    assert plan["compile_seconds"] > 0


def test_what_does_not_fit_ends_with_3_and_says_what_would_help(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 100}
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    keys = ["--config.train.batch_size=8", "--config.data.row_length=8"]
    code = cli.main(["plan", "--topology=cpu:8", f"--config.model={folder}", *keys, *MESH])
    assert code == 3
    assert "GB too much. Most of it are parameters" in capsys.readouterr().out


def test_a_search_keeps_the_plans_and_shows_the_fastest(
    folder: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    monkeypatch.setenv("RANKTUNER_CACHE", str(tmp_path / "cache"))
    command = ["plan", "--topology=cpu:8", "--search=2", "--json", f"--config.model={folder}"]
    assert cli.main([*command, *SHAPE]) == 0
    found = json.loads(capsys.readouterr().out)
    # Least recomputation and fewest micro-batches come first; with these, no more are tried.
    tried = [one["settings"] for one in found["tried"]]
    assert {(one["train.remat"], one["train.accumulation"]) for one in tried} == {("dots", 1)}
    assert sorted(one["mesh.fsdp"] for one in tried) == [4, 8]
    assert found["step_seconds"] == min(one["step_seconds"] for one in found["tried"])
    for kept in (tmp_path / "cache" / "plans").iterdir():
        kept.write_text(json.dumps(found | {"step_seconds": [7.0, 8.0]}), encoding="utf-8")
    assert cli.main([*command, *SHAPE]) == 0
    assert json.loads(capsys.readouterr().out)["step_seconds"] == [7.0, 8.0]


@pytest.mark.parametrize("name", ["v5e:64", "cpu", "h200", "v5e", "2*cpu:8"])
def test_an_unknown_topology_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--topology: expected a TPU's version"):
        topologies.devices(name)


def test_a_name_of_google_cloud_is_a_version_and_a_shape() -> None:
    for name, shape in topologies.ACCELERATORS.items():
        version, _, sizes = shape.partition(":")
        chips = math.prod(map(int, sizes.split("x")))
        cores = 2 if version in ("v4", "v5p") else 1
        assert name.endswith(f"-{chips * cores}")


def test_more_cpu_devices_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="expected cpu:1 to cpu:8 here, got cpu:9"):
        topologies.devices("cpu:9")


def test_a_mesh_of_another_size_is_refused(folder: pathlib.Path) -> None:
    with pytest.raises(UserError, match="mesh: expected sizes that multiply to"):
        make_plan(config_of(folder, "--config.mesh.data=3"), "cpu:8")


def test_what_slices_send_to_each_other_takes_the_time_of_the_data_center_s_network(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(folder, "--config.mesh.data=1")
    step = compile_step(config, read_model(config), topologies.devices("cpu:1"))
    sent = (Collective("all-reduce", ("data",), ("f32",), 1.0, 6e9, dcn=True),)
    chip = Chip("chip", 16.0, 1e15, 1e15, 1e9, dcn_bandwidth=3e9)
    known = roofline(step, step.program(), chip, sent)
    assert (known.network_seconds, known.dcn_seconds, known.low) == (0.0, 2.0, 2.0)
    unknown = roofline(step, step.program(), dataclasses.replace(chip, dcn_bandwidth=None), sent)
    assert unknown.dcn_seconds is None
    assert unknown.low == unknown.busy_seconds < 2.0

    plan = make_plan(config, "cpu:1")
    assert plan.to_json()["dcn_seconds"] == 0.0
    for found, text in ((known, "2"), (unknown, "unknown")):
        between = dataclasses.replace(plan, roofline=found, collectives=sent)
        tables.show_plan(between, Console())
        shown = capsys.readouterr().out
        assert "data (dcn)" in shown
        assert re.search(rf"its network between slices, s\W+{text}\W", shown)
        assert between.to_json()["collectives"][0]["dcn"] is True


def test_nothing_is_placed_on_a_device(folder: pathlib.Path) -> None:
    before = sum(array.nbytes for array in jax.live_arrays())
    make_plan(config_of(folder, *MESH), "cpu:8")
    assert sum(array.nbytes for array in jax.live_arrays()) <= before + 1024


def test_adapters_have_gradients_and_moments_and_the_model_has_not(folder: pathlib.Path) -> None:
    whole = make_plan(config_of(folder, *MESH), "cpu:8")
    lora = make_plan(config_of(folder, *MESH, "--config.lora.rank=2"), "cpu:8")
    assert lora.memory_gb["optimizer"] < whole.memory_gb["optimizer"] / 5
    assert lora.memory_gb["parameters"] > whole.memory_gb["parameters"]
    # The gradients of the head and of the layers' matrices are not computed.
    matrices = 3 * (64 * (4 + 2 + 2 + 4) * 16 + 3 * 64 * 192) + 512 * 64
    gradients = 2 * (16 * 128 // 4) * (matrices // 2)
    assert whole.roofline.flops - lora.roofline.flops > 0.7 * gradients


def test_what_xla_refuses_ends_with_3_and_is_one_line_of_a_search(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm\nmore")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    command = ["plan", "--topology=cpu:8", "--json", f"--config.model={folder}", *SHAPE, *MESH]
    assert cli.main(command) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out)["fits"] is False
    assert len(printed.err.strip().splitlines()) == 1
    assert "RESOURCE_EXHAUSTED: Ran out of memory in hbm" in printed.err
