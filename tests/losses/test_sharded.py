"""The loss over meshes of eight devices against one device."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ranktuner_jax import losses
from tests.losses.problems import (
    CLASSES,
    Array,
    Loss,
    Method,
    Params,
    Problem,
    Result,
    assert_same_gradients,
    assert_same_sums,
    compiled,
    make_problem,
    make_weighting,
    method_id,
)
from tests.tolerances import EXACT_GRADIENT, EXACT_SCALE, F32, LOSS_GRADIENT

VOCAB = 53
BATCH_AXES = ("data", "fsdp")


def make_padded(vocab: int = VOCAB, rows: int = 56) -> Problem:
    """Eight rows of tokens, the first without a supervised one; padding rows of large logits."""
    problem = make_problem(8, 5, vocab=vocab, seed=4)
    problem.mask[0] = False
    unembed = np.concatenate([problem.unembed, np.full((rows - vocab, 16), 8, np.float32)])
    return Problem(problem.hidden, unembed, problem.labels, problem.mask)


PROBLEM = make_padded()


def make_mesh(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def sharded_loss(
    shape: tuple[int, ...], spec: P, **options: Any
) -> tuple[Loss, list[NamedSharding]]:
    """The loss on a mesh, and its inputs laid out on it."""
    mesh = make_mesh(*shape)
    loss = losses.sharded_weighted_nll(
        mesh,
        batch_axes=BATCH_AXES,
        vocab_axis="tensor" if shape[2] > 1 else None,
        unembed_spec=spec,
        chunk_size=3,
        **options,
    )
    return loss, [
        NamedSharding(mesh, s) for s in (P(BATCH_AXES), spec, P(BATCH_AXES), P(BATCH_AXES))
    ]


def value_and_grads(loss: Loss, inputs: Sequence[Array], **options: Any) -> Result:
    def total(hidden: Array, unembed: Array) -> Array:
        output = loss(hidden, unembed, *inputs[2:], **options)
        return output.total, output

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, output), grads = run(*inputs[:2])
    return output, grads


def single(weighting: losses.Weighting, **options: Any) -> Result:
    return value_and_grads(
        lambda *a, **k: losses.fused_weighted_nll(
            *a, weighting=weighting, vocab_size=VOCAB, chunk_size=40, **k
        ),
        [jnp.asarray(x) for x in PROBLEM.inputs],
        **options,
    )


def check(shape: tuple[int, ...], spec: P, weighting: losses.Weighting, **options: Any) -> None:
    loss, shardings = sharded_loss(shape, spec, weighting=weighting, vocab_size=VOCAB)
    inputs = jax.device_put(PROBLEM.inputs, tuple(shardings))
    output, grads = value_and_grads(loss, inputs, **options)
    expected, expected_grads = single(weighting, **options)
    exact = "expected_rank" in weighting.requires
    assert_same_sums(output, expected, EXACT_SCALE if exact else F32)
    assert_same_gradients(grads, expected_grads, EXACT_GRADIENT if exact else LOSS_GRADIENT)
    for grad, given in zip(grads, inputs, strict=False):
        assert grad.sharding.is_equivalent_to(given.sharding, grad.ndim)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 1, 1), P()),
        ((1, 8, 1), P("fsdp")),
        ((1, 1, 8), P("tensor")),
        ((2, 2, 2), P("tensor", "fsdp")),
        ((2, 2, 2), P(("tensor", "fsdp"))),
        ((2, 2, 2), P("tensor")),
    ],
    ids=str,
)
def test_meshes_give_the_numbers_of_one_device(shape: tuple[int, ...], spec: P) -> None:
    check(shape, spec, losses.RankTuner())


@pytest.mark.usefixtures("accelerator")
def test_the_form_for_accelerators_over_batch_fsdp_and_vocabulary() -> None:
    check((2, 2, 2), P("tensor", "fsdp"), losses.RankTuner())


@pytest.mark.parametrize("method", CLASSES[1:], ids=method_id)
def test_every_method_over_batch_fsdp_and_vocabulary(method: Method) -> None:
    check((2, 2, 2), P("tensor", "fsdp"), make_weighting(method))


def test_ids_token_weights_and_ramp_are_sharded_too(rng: np.random.Generator) -> None:
    # Ids differ within a device only: one row a device here, two sequences a row.
    ids = np.arange(8)[:, None] * 2 + (np.arange(5) > 2)
    check(
        (8, 1, 1),
        P(),
        losses.TALR(),
        sequence_ids=jnp.asarray(ids, jnp.int32),
        token_weights=jnp.asarray(rng.uniform(0, 2, (8, 5)), jnp.float32),
        ramp=jnp.float32(0.5),
    )


COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
# Groups of one device: nothing is communicated over batch axes of size one.
ALONE = re.compile(r"replica_groups=(?:\{\{\d+\}|\[8,1\]<=)")


def collectives(
    shape: tuple[int, ...], spec: P, rows: int, weighting: losses.Weighting, *, gradients: bool
) -> list[tuple[str, str]]:
    loss, shardings = sharded_loss(shape, spec, weighting=weighting)
    arguments = [
        jax.ShapeDtypeStruct(s, d, sharding=sharding)
        for s, d, sharding in zip(
            ((8, 5, 16), (rows, 16), (8, 5), (8, 5)),
            (jnp.float32, jnp.float32, jnp.int32, bool),
            shardings,
            strict=True,
        )
    ]

    def total(*inputs: Array) -> Array:
        return loss(*inputs).total

    function = jax.grad(total, argnums=(0, 1)) if gradients else total
    text, _ = compiled(function, *arguments)
    found = []
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        if match and not ALONE.search(line):
            types, kind = match.groups()
            found.append((kind, re.sub(r"\{[^}]*\}", "", types)))
    return sorted(found)


@pytest.mark.parametrize("method", [CLASSES[1], ("eaft", {}), ("deft", {})], ids=method_id)
def test_collectives_over_the_vocabulary_do_not_grow_with_it(method: Method) -> None:
    small, large = (
        collectives((1, 1, 8), P("tensor"), rows, make_weighting(method), gradients=True)
        for rows in (8 * 32, 8 * 96)
    )
    assert small
    assert small == large


def test_collectives_of_fsdp_do_grow_and_are_seen() -> None:
    small, large = (
        collectives((1, 8, 1), P("fsdp"), rows, losses.RankTuner(), gradients=True)
        for rows in (256, 768)
    )
    assert [kind for kind, _ in small] == [kind for kind, _ in large]
    assert small != large


def local_step(
    axis: str, pcast: bool, weighting: losses.Weighting
) -> Callable[..., tuple[Params, Array]]:
    """The pattern of the docstring: differentiate the local total, psum, divide."""

    def step(params: Params, labels: Array, mask: Array, inputs: Array) -> tuple[Params, Array]:
        if pcast:
            params = jax.lax.pcast(params, axis, to="varying")

        def loss_fn(params: Params) -> tuple[Array, losses.LossOutput]:
            output = losses.fused_weighted_nll(
                jnp.tanh(inputs @ params["w"]),
                params["unembed"],
                labels,
                mask,
                weighting=weighting,
                chunk_size=3,
                vocab_size=VOCAB,
                axis_name=axis,
            )
            return output.total, output

        grads, output = jax.grad(loss_fn, has_aux=True)(params)
        grads, output = jax.lax.psum((grads, output), axis)
        return jax.tree.map(lambda g: g / output.denom, grads), output.mean()

    return step


PARAMS = {"w": np.eye(16, dtype=np.float32), "unembed": PROBLEM.unembed}


def one_device(weighting: losses.Weighting) -> tuple[Array, Params]:
    def mean(params: Params) -> Array:
        return losses.fused_weighted_nll(
            jnp.tanh(PROBLEM.hidden @ params["w"]),
            params["unembed"],
            jnp.asarray(PROBLEM.labels),
            jnp.asarray(PROBLEM.mask),
            weighting=weighting,
            vocab_size=VOCAB,
        ).mean()

    return jax.jit(jax.value_and_grad(mean))(PARAMS)


@pytest.mark.parametrize(
    "weighting", [losses.RankTuner(), losses.TALR()], ids=["ranktuner", "talr"]
)
@pytest.mark.parametrize("way", ["check_vma", "no check_vma", "pmap"])
def test_local_loss_inside_shard_map_and_pmap(way: str, weighting: losses.Weighting) -> None:
    batch = (PROBLEM.labels, PROBLEM.mask, PROBLEM.hidden)
    step = local_step("batch", way == "check_vma", weighting)
    if way == "pmap":
        split = [x.reshape(8, 1, *x.shape[1:]) for x in batch]
        grads, mean = jax.pmap(step, axis_name="batch", in_axes=(None, 0, 0, 0))(PARAMS, *split)
        grads, mean = jax.tree.map(lambda x: x[0], (grads, mean))
    else:
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
        grads, mean = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(P(), P("batch"), P("batch"), P("batch")),
                out_specs=P(),
                check_vma=way == "check_vma",
            )
        )(PARAMS, *batch)
    expected_mean, expected_grads = one_device(weighting)
    np.testing.assert_allclose(mean, expected_mean, **F32)
    assert_same_gradients(grads, expected_grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_axes": "rows"}, "axes must be among those of the mesh"),
        ({"batch_axes": "data", "vocab_axis": "data"}, "vocab_axis must not be a batch axis"),
        (
            {"batch_axes": BATCH_AXES, "vocab_axis": "tensor", "unembed_spec": P("fsdp", "tensor")},
            "must split the rows over vocab_axis",
        ),
        ({"batch_axes": "data", "unembed_spec": P("fsdp")}, "vocab_axis and batch axes only"),
    ],
)
def test_axes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.sharded_weighted_nll(make_mesh(2, 2, 2), **options)


def test_axes_of_one_device_cost_nothing() -> None:
    # Their collectives would copy the unembedding, and into another layout.
    axes, types = ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), axes, axis_types=types, devices=jax.devices()[:1])
    loss = losses.sharded_weighted_nll(
        mesh, batch_axes=BATCH_AXES, vocab_axis="tensor", unembed_spec=P("tensor", "fsdp")
    )
    inputs = [jnp.asarray(x) for x in PROBLEM.inputs]

    def total(hidden: Array, unembed: Array, labels: Array, mask: Array) -> Array:
        return loss(hidden, unembed, labels, mask).total

    text, _ = compiled(jax.value_and_grad(total, argnums=(0, 1)), *inputs)
    assert not COLLECTIVE.search(text)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 1, 1), P()),
        ((1, 8, 1), P("fsdp")),
        ((1, 1, 8), P("tensor")),
        ((2, 2, 2), P("tensor", "fsdp")),
    ],
    ids=str,
)
def test_statistics_over_a_mesh_are_those_of_one_device(shape: tuple[int, ...], spec: P) -> None:
    fields = ("expected_rank", "topk_entropy", "collision")
    options: dict[str, Any] = {"fields": fields, "chunk_size": 3, "vocab_size": VOCAB}
    stats = losses.sharded_token_stats(
        make_mesh(*shape),
        batch_axes=BATCH_AXES,
        vocab_axis="tensor" if shape[2] > 1 else None,
        unembed_spec=spec,
        **options,
    )
    actual = jax.jit(stats)(*PROBLEM.inputs)
    expected = losses.fused_token_stats(*map(jnp.asarray, PROBLEM.inputs), **options)
    np.testing.assert_array_equal(actual.rank, expected.rank)
    assert not np.asarray(actual.rank)[~PROBLEM.mask].any()
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, **F32)


def test_statistics_over_a_mesh_refuse_an_unknown_field() -> None:
    with pytest.raises(ValueError, match="fields must be among"):
        losses.sharded_token_stats(make_mesh(8, 1, 1), batch_axes="data", fields=["median"])
