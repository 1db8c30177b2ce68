"""Folders in and out: what is refused, what is kept, and how much memory it takes."""

import contextlib
import errno
import json
import pathlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from ranktuner_jax import models
from ranktuner_jax.errors import UserError
from ranktuner_jax.models import rope
from tests.models import tiny


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "model"
    path.mkdir()
    tiny.write_checkpoint("qwen3", path)
    return path


def edit_config(folder: pathlib.Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """While it lasts, the system refuses to let any file grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_missing_surplus_and_misshapen_tensors_are_all_listed(folder: pathlib.Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((24, 8), np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        models.load_pretrained(folder)
    message = str(error.value)
    assert "1 missing: model.norm.weight" in message
    assert "1 surplus: model.layers.9.mlp.up_proj.weight" in message
    assert "up_proj.weight (expected (24, 16), got (24, 8))" in message
    assert "\n" not in message


def test_a_tied_head_that_is_written_again_is_ignored(folder: pathlib.Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    model = models.load_pretrained(folder)
    assert model.unembed.shape == (31, 16)


def test_what_is_not_supported_is_named(folder: pathlib.Path) -> None:
    edit_config(folder, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])
    with pytest.raises(UserError, match=r"'gpt_neox' is not supported; supported: llama, mistral"):
        models.load_pretrained(folder)
    edit_config(folder, model_type="nonesuch")
    with pytest.raises(UserError, match="nonesuch"):
        models.load_pretrained(folder)
    edit_config(folder, model_type="qwen3", hidden_act="gelu")
    with pytest.raises(UserError, match="hidden_act 'gelu' is not supported; supported: silu"):
        models.load_pretrained(folder)


def test_rope_settings_that_are_not_supported_are_named() -> None:
    with pytest.raises(
        UserError, match="rope type 'longrope' is not supported; supported: default"
    ):
        models.RopeConfig.from_parameters({"rope_type": "longrope", "factor": 2.0})
    with pytest.raises(UserError, match="'linear': unknown settings twist; known: factor"):
        models.RopeConfig.from_parameters({"rope_type": "linear", "factor": 2.0, "twist": 1})
    with pytest.raises(UserError, match="partial_rotary_factor"):
        models.RopeConfig.from_parameters({"rope_type": "default", "partial_rotary_factor": 0.5})
    with pytest.raises(UserError, match="'llama3': missing settings high_freq_factor"):
        models.RopeConfig.from_parameters({"rope_type": "llama3", "factor": 2.0})


def test_yarn_scales_attention_as_its_settings_say() -> None:
    settings = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    position = jnp.zeros((1, 1), jnp.int32)

    def scaling(**more: float) -> float:
        config = models.RopeConfig.from_parameters(settings | more)
        return float(rope.rotary_tables(config, position, 8, 64)[0][0, 0, 0])

    assert scaling() == pytest.approx(0.1 * np.log(4) + 1)
    assert scaling(attention_factor=1.5) == pytest.approx(1.5)
    assert scaling(mscale=2.0, mscale_all_dim=1.0) == pytest.approx(
        (0.2 * np.log(4) + 1) / (0.1 * np.log(4) + 1)
    )


@pytest.mark.parametrize(
    ("settings", "middle"),
    [  # What transformers' own function gives; frequencies beside these are as without YaRN.
        ({}, [0.025694, 0.00625, 0.0013835]),
        ({"truncate": False}, [0.02387, 0.005057, 0.00081129]),
        ({"beta_fast": 16, "beta_slow": 2}, [0.023717, 0.005, 0.00079057]),
    ],
)
def test_yarn_frequencies_are_those_of_transformers(
    settings: dict[str, Any], middle: list[float]
) -> None:
    known = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    config = models.RopeConfig.from_parameters(known | settings)
    cos, sin = rope.rotary_tables(config, jnp.ones((1, 1), jnp.int32), 16, 8192)
    expected = [1.0, 0.31623, 0.1, *middle, 0.00025, 7.9057e-05]
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 0], expected, rtol=2e-5)


def test_folders_that_are_no_model_are_refused(folder: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no such folder; give a Hugging Face folder"):
        models.resolve("no-such-model")
    with pytest.raises(UserError, match=r"no config\.json"):
        models.load_pretrained(folder.parent)
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        models.load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="found no safetensors file"):
        models.load_pretrained(folder)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names model-00001-of-00002\.safetensors, which is"):
        models.load_pretrained(folder)


def test_a_hub_id_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find\nthe snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        UserError, match=r"'owner/name': .*cannot find.*give a local folder"
    ) as error:
        models.resolve("owner/name")
    assert "\n" not in str(error.value)


def test_a_hub_id_becomes_its_snapshot(
    monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    assert models.resolve("owner/name") == folder


def test_loading_onto_a_mesh_pads_the_vocabulary_and_saving_drops_it(folder: pathlib.Path) -> None:
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    model = models.load_pretrained(folder, mesh=mesh)
    assert model.unembed.shape == (32, 16)
    assert model.unembed.sharding.shard_shape((32, 16)) == (8, 8)
    assert not np.asarray(model.unembed)[31].any()
    single = models.load_pretrained(folder)
    logits = nnx.jit(lambda m, t: m.logits(m(t)))
    np.testing.assert_allclose(logits(model, tiny.TOKENS), logits(single, tiny.TOKENS), atol=1e-5)
    models.save_pretrained(model, folder.parent / "out")
    original = load_file(folder / "model.safetensors")
    for name, value in load_file(folder.parent / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(value, original[name])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("axes", [(), ("fsdp",), ("fsdp", "tensor")])
def test_the_file_is_the_one_that_safetensors_would_write(
    folder: pathlib.Path, axes: tuple[str, ...], dtype: jnp.dtype
) -> None:
    sizes = ((), (8,), (2, 4))[len(axes)]
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes)) if axes else None
    model = models.load_pretrained(folder, mesh=mesh, param_dtype=dtype)
    models.save_pretrained(model, folder.parent / "out")
    ours = folder.parent / "out" / "model.safetensors"
    save_file(load_file(ours), folder / "theirs.safetensors", metadata={"format": "pt"})
    assert ours.read_bytes() == (folder / "theirs.safetensors").read_bytes()


def test_saving_where_the_system_refuses_is_an_os_error_and_leaves_nothing(
    folder: pathlib.Path,
) -> None:
    model = models.load_pretrained(folder)
    before = sorted(folder.parent.iterdir())
    with file_size_limit(4096), pytest.raises(OSError, match="File too large") as error:
        models.save_pretrained(model, folder.parent / "out")
    assert error.value.errno == errno.EFBIG
    assert sorted(folder.parent.iterdir()) == before


def test_saving_keeps_type_tokenizer_and_template(folder: pathlib.Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "notes.txt"):
        (folder / name).write_text(f'"{name}"')
    model = models.load_pretrained(folder, param_dtype=jnp.bfloat16)
    out = folder.parent / "deep" / "out"
    models.save_pretrained(model, out, tokenizer_from=folder)
    assert sorted(p.name for p in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == jnp.bfloat16


@pytest.mark.parametrize("known", [None, 2, [2, 5]])
def test_saving_names_the_template_and_where_generation_ends(
    folder: pathlib.Path, known: int | list[int] | None
) -> None:
    (folder / "chat_template.jinja").write_text("its own")
    # As Qwen2.5 ships it, and as transformers will not write it.
    theirs = {"top_p": 0.8, "do_sample": False, "eos_token_id": known, "pad_token_id": 9}
    if known is not None:
        (folder / "generation_config.json").write_text(json.dumps(theirs))
    out = folder.parent / "out"
    models.save_pretrained(
        models.load_pretrained(folder),
        out,
        tokenizer_from=folder,
        chat_template="≈ given",
        stop_ids=[7, 2],
    )
    assert (out / "chat_template.jinja").read_text("utf-8") == "≈ given"
    written = json.loads((out / "generation_config.json").read_text())
    if known is None:  # Then the model's config is what transformers goes by.
        assert (written["eos_token_id"], written["pad_token_id"]) == ([2, 7], 0)
    else:
        assert written == theirs | {
            "eos_token_id": sorted({7, *(known if isinstance(known, list) else [known])})
        }


def test_several_tokens_may_end_a_text(folder: pathlib.Path) -> None:
    edit_config(folder, eos_token_id=[2, 5])
    model = models.load_pretrained(folder)
    assert model.config.eos_token_id == (2, 5)
    models.save_pretrained(model, folder.parent / "out")
    assert json.loads((folder.parent / "out" / "config.json").read_text())["eos_token_id"] == [2, 5]


def test_nothing_is_overwritten_and_nothing_is_half_written(folder: pathlib.Path) -> None:
    model = models.load_pretrained(folder)
    with pytest.raises(UserError, match="exists already; give a new path"):
        models.save_pretrained(model, folder)
    (folder.parent / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        models.save_pretrained(model, folder.parent / "file" / "out")

    # The weights fit, and are written first; the tokenizer does not.
    weights = (folder / "model.safetensors").stat().st_size
    (folder / "tokenizer.json").write_bytes(bytes(2 * weights))
    with file_size_limit(weights + 4096), pytest.raises(OSError, match="File too large") as error:
        models.save_pretrained(model, folder.parent / "out", tokenizer_from=folder)
    assert "tokenizer.json" in str(error.value)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["file", "model"]


@pytest.mark.parametrize("variable", ["RANKTUNER_CACHE", "HOME"])
def test_the_cache_lies_where_the_environment_says(
    variable: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANKTUNER_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    cache = tmp_path / ".cache" / "ranktuner_jax" if variable == "HOME" else tmp_path
    converted = cache / "models" / "smollm2-135m"
    converted.mkdir(parents=True)
    assert models.resolve("smollm2-135m") == converted


def test_loading_holds_one_shard_and_one_tensor_beside_the_model() -> None:
    # 100 MB in bfloat16; `ranktuner bench model --loading` measures it on 1 GB.
    program = "from ranktuner_jax.bench import model; print(*model.measure_loading(100))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parents[2],
    )
    kept, peak, bound = map(float, done.stdout.split()[-3:])
    assert kept > 80
    # The allocator's and the runtime's own pages are not the loader's.
    assert peak - kept < bound + 16, done.stdout
