"""Programs that XLA compiles here, and parts of one that it compiled for a TPU, are read right."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ranktuner_jax.plan.collectives import collectives, total_gb
from ranktuner_jax.plan.hlo import Program


def compiled(function: Callable[..., jax.Array], *shapes: tuple[int, ...]) -> str:
    """The optimized program of a function of float32 arrays."""
    inputs = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    return text_of(jax.jit(function).lower(*inputs))


def text_of(lowered: jax.stages.Lowered) -> str:
    """The optimized program."""
    text = lowered.compile().as_text()
    assert text is not None
    return text


def test_a_matrix_product_has_two_flops_for_each_product() -> None:
    program = Program(compiled(jnp.matmul, (24, 40), (40, 56)))
    assert program.flops == 2 * 24 * 40 * 56


def test_a_batched_product_counts_its_batch_once() -> None:
    program = Program(compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (3, 8, 5), (3, 5, 7)))
    assert program.flops == 2 * 3 * 8 * 5 * 7


def test_what_lies_in_nested_loops_counts_as_often_as_they_run() -> None:
    def function(x: jax.Array) -> jax.Array:
        def outer(y: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.fori_loop(0, 5, lambda _, z: jnp.sin(z @ x), y), None

        return jax.lax.scan(outer, x, None, length=3)[0]

    assert Program(compiled(function, (16, 16))).flops == 3 * 5 * 2 * 16**3


def test_a_loop_of_unknown_length_runs_as_often_as_it_is_said_to() -> None:
    def function(x: jax.Array, count: jax.Array) -> jax.Array:
        with jax.named_scope("chunks_of_16"):
            return jax.lax.fori_loop(0, count.astype(jnp.int32), lambda _, y: y @ x, x)

    text = compiled(function, (16, 16), ())
    program = Program(text, lambda path: 7.0 if "chunks_of_16" in path else 1.0)
    assert program.flops == 7 * 2 * 16**3


def test_a_fusion_moves_its_inputs_and_its_output_and_nothing_between() -> None:
    program = Program(compiled(lambda x: jnp.sin(x) * 2 + jnp.cos(x), (1024, 256)))
    moved = sum(times * traffic for _, times, _, traffic in program.work())
    assert moved == 2 * 4 * 1024 * 256


def test_a_slice_that_a_loop_reads_counts_not_the_whole_array() -> None:
    def function(stacked: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, x: (jnp.sin(y + x), None), stacked[0], stacked)[0]

    program = Program(compiled(function, (50, 4096)))
    moved = sum(times * traffic for _, times, _, traffic in program.work())
    # 50 times: a slice and the carry are read, the carry is written.
    assert moved < 2 * 50 * 3 * 4 * 4096
    assert moved >= 50 * 3 * 4 * 4096


def mesh_of(*sizes: int) -> Mesh:
    """A mesh of fake CPU devices with the trainer's axes."""
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(("sizes", "axis"), [((2, 4, 1), "fsdp"), ((4, 2, 1), "data")])
def test_collectives_are_counted_by_axis_and_bytes(sizes: tuple[int, ...], axis: str) -> None:
    mesh = mesh_of(*sizes)
    group = mesh.shape[axis]

    def local(x: jax.Array) -> jax.Array:
        whole = jax.lax.all_gather(x, axis, axis=0, tiled=True)
        return jax.lax.psum(jnp.sin(whole), axis) * x.sum()

    spec = PartitionSpec(axis)
    function = jax.shard_map(
        local, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False
    )
    shape = jax.ShapeDtypeStruct((64, 32), "float32", sharding=NamedSharding(mesh, spec))
    text = text_of(jax.jit(function).lower(shape))
    found = {one.kind: one for one in collectives(Program(text), mesh)}
    share, whole = (group - 1) / group, 4 * 64 * 32
    assert {one.axes for one in found.values()} == {(axis,)}
    assert found["all-gather"].num_bytes == share * whole
    assert found["all-reduce"].num_bytes == 2 * share * whole
    assert sum(total_gb(found.values()).values()) == pytest.approx(3 * share * whole / 1e9)


# As XLA:TPU prints a product whose batch axis is a window, a chain of fusions that share one
# gather, and a kernel whose own text takes several lines.
TPU = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/env/site-packages/flax/nnx/a.py"
2 "/home/me/ranktuner_jax/models/decoder.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=5 end_line=5 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=77 end_line=77 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=1}

%first (p0: bf16[56,128]) -> bf16[448,128] {
  %p0 = bf16[56,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[448,128]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=3, \
replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, dimensions={0}, \
frontend_attributes={chain_id="0"}
}

%second (p1: bf16[56,128]) -> bf16[448,128] {
  %p1 = bf16[56,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[448,128]{1,0:T(8,128)(2,1)} all-gather(%p1), channel_id=3, \
replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, dimensions={0}, \
frontend_attributes={chain_id="0"}
}

%body (arg: (s32[], bf16[56,128])) -> (s32[], bf16[56,128]) {
  %arg = (s32[]{:T(128)}, bf16[56,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[56,128]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %kernel = bf16[56,128]{1,0:T(8,128)(2,1)} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={"body": "module {
}}, metadata={op_name="jit(step)/splash_mha_fwd" stack_frame_id=2}
  %fusion.1 = bf16[448,128]{1,0:T(8,128)(2,1)} fusion(%kernel), kind=kCustom, calls=%first
  %fusion.2 = bf16[448,128]{1,0:T(8,128)(2,1)S(1)} fusion(%kernel), kind=kCustom, calls=%second
  %lhs = bf16[64,2048,1]{1,0,2:T(8,128)(2,1)} constant({...})
  %rhs = bf16[28,16,2048]{2,1,0:T(8,128)(2,1)} constant({...})
  %dot = f32[64,28,16]{2,1,0:T(8,128)} convolution(%lhs, %rhs), window={size=28 pad=27_27 \
rhs_reversal=1}, dim_labels=bf0_0oi->b0f
  ROOT %result = (s32[]{:T(128)}, bf16[56,128]{1,0:T(8,128)(2,1)}) tuple(%i, %x)
}

%condition (arg.1: (s32[], bf16[56,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[56,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %end = s32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

ENTRY %main (state: (s32[], bf16[56,128])) -> (s32[], bf16[56,128]) {
  %state = (s32[]{:T(128)}, /*index=1*/bf16[56,128]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, bf16[56,128]{1,0:T(8,128)(2,1)}) while(%state), \
condition=%condition, body=%body
}
"""


def test_a_tpu_s_product_with_a_batch_axis_counts_real_entries() -> None:
    assert Program(TPU).flops == 6 * 2 * 64 * 28 * 16 * 2048


def test_the_clock_cycles_of_a_loop_count_as_often_as_it_runs() -> None:
    noted = TPU.replace(
        "->b0f", '->b0f, backend_config={"window_config":{"estimated_cycles":"30"}}'
    )
    assert Program(TPU).cycles == 0
    assert Program(noted).cycles == 6 * 30


def test_a_gather_that_runs_beside_others_counts_once() -> None:
    [gather] = collectives(Program(TPU), mesh_of(1, 8, 1))
    assert (gather.kind, gather.axes, gather.count) == ("all-gather", ("fsdp",), 6)
    assert gather.num_bytes == 6 * 7 / 8 * 2 * 448 * 128


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is read of a chip."""

    id: int
    slice_index: int


def four_slices() -> Mesh:
    """A mesh of 4 × 4 chips, of which each quarter is a slice."""
    devices = np.empty((4, 4, 1), object)
    for data, fsdp in np.ndindex(4, 4):
        piece, place = data // 2 * 2 + fsdp // 2, data % 2 * 2 + fsdp % 2
        devices[data, fsdp, 0] = Chip(100000 * (piece + 1) + place, piece)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


# As XLA:TPU prints what slices send to each other, and what the chips of one do.
SLICES = """\
HloModule jit_step, is_scheduled=true

ENTRY %main (x: f32[1024,512]) -> f32[1024,512] {
  %x = f32[1024,512]{1,0:T(8,128)} parameter(0)
  %after-all = token[] after-all()
  %send.1 = (f32[1024,512]{1,0:T(8,128)}, u32[], token[]) send(%x, %after-all), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"\
,_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.1 = token[] send-done(%send.1), channel_id=2, is_host_transfer=true
  %send.2 = (f32[1024,512]{1,0:T(8,128)}, u32[], token[]) send(%x, %after-all), channel_id=4, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"\
,_xla_megascale_target={{100000,300000},{100001,300001},{200000,400000},{200001,400001}},\
_xla_megascale_transfer_type="ALL_GATHER"}
  %send.3 = (f32[1024,512]{1,0:T(8,128)}, u32[], token[]) send(%x, %after-all), channel_id=6, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"\
,_xla_megascale_target={{100000->200000},{200000->100000}},\
_xla_megascale_transfer_type="ONE_TO_ONE"}
  %recv.3 = (f32[1024,512]{1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=5, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"\
,_xla_megascale_target={{100000->200000},{200000->100000}},\
_xla_megascale_transfer_type="ONE_TO_ONE"}
  ROOT %sum = f32[1024,512]{1,0:T(8,128)} all-reduce(%x), channel_id=1, \
replica_groups={{0,2},{1,3}}, use_global_device_ids=true
}
"""


def test_what_slices_send_to_each_other_is_told_from_what_their_chips_do() -> None:
    found = collectives(Program(SLICES), four_slices())
    size = 4 * 1024 * 512
    assert {(one.kind, one.axes, one.dcn, one.num_bytes) for one in found} == {
        ("all-reduce", ("data", "fsdp"), True, 2 * 3 / 4 * size),
        ("all-gather", ("data",), True, size),
        ("collective-permute", ("fsdp",), True, size),
        ("all-reduce", ("data",), False, 2 * 1 / 2 * size),
    }
    assert {one.count for one in found} == {1.0}


# The same where XLA has taken the first iteration out of the loop: its gather's last part is there.
PEELED = TPU.replace(
    "  %state = (s32[]{:T(128)}, /*index=1*/bf16[56,128]{1,0:T(8,128)(2,1)}) parameter(0)\n",
    """\
  %x.1 = bf16[56,128]{1,0:T(8,128)(2,1)} parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %begin = s32[]{:T(128)} copy(%one)
  %state = (s32[]{:T(128)}, bf16[56,128]{1,0:T(8,128)(2,1)}) tuple(%begin, %x.1)
  %all-gather.3 = bf16[448,128]{1,0:T(8,128)(2,1)} all-gather(%x.1), channel_id=3, \
replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, dimensions={0}, \
frontend_attributes={chain_id="0"}
""",
)


def test_a_loop_that_begins_with_its_second_iteration_runs_once_less() -> None:
    assert Program(PEELED).flops == 5 * 2 * 64 * 28 * 16 * 2048


def test_a_gather_that_others_run_beside_in_a_loop_counts_as_often_as_it_ends() -> None:
    [gather] = collectives(Program(PEELED), mesh_of(1, 8, 1))
    assert gather.count == 1


def test_memory_on_the_chip_is_not_main_memory() -> None:
    fusions = {one.name: one for one, *_ in Program(TPU).work() if one.opcode == "fusion"}
    assert fusions["fusion.1"].num_bytes == 2 * 448 * 128
    assert fusions["fusion.2"].num_bytes == 0


def test_an_instruction_leads_to_our_line_and_not_to_a_library_s() -> None:
    program = Program(TPU)
    [kernel] = [one for one, *_ in program.work() if one.opcode == "custom-call"]
    assert kernel.op_name == "jit(step)/splash_mha_fwd"
    assert program.source(kernel) == "models/decoder.py:77"
