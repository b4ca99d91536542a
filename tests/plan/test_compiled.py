"""Exchanges read from the text of programs: made ones, and one compiled for eight devices."""

import pytest

from w2s_jax.plan.compiled import BETWEEN_SLICES, Collective, collectives, gathers_of

TEXT = """HloModule jit_step, entry_computation_layout={()->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner_condition (p: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%inner (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-reduce.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %g = (bf16[2,16]{1,0}, bf16[16,16]{1,0}) all-gather-start(%w), replica_groups=[1,8]<=[8], dimensions={0}
  %d = bf16[16,16]{1,0} all-gather-done(%g)
}

%outer_condition (p: (s32[])) -> pred[] {
  %limit.2 = u32[]{:T(128)} constant(5)
  ROOT %lt.2 = pred[] compare(%i, %limit.2), direction=LT
}

%outer (p: (s32[])) -> (s32[]) {
  %while.1 = (s32[], bf16[4,8]{1,0}) while(%t), condition=%inner_condition, body=%inner, metadata={}
  %p.1 = f32[6]{0} collective-permute(%y), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.2 = (s32[]) while(%t), condition=%outer_condition, body=%outer
  ROOT %all-to-all.1 = f32[8]{0} all-to-all(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}
"""  # noqa: E501


def test_loops_multiply_what_is_in_them():
    found = {one.kind: one for one in collectives(TEXT)}
    assert found["all-reduce"] == Collective("all-reduce", (4, 8), 64, 4, 160, True)
    assert found["all-gather"] == Collective("all-gather", (16, 16), 512, 8, 160, True)
    assert found["collective-permute"] == Collective("collective-permute", (6,), 24, 2, 5, True)
    assert found["all-to-all"] == Collective("all-to-all", (8,), 32, 2, 1, False)
    assert len(collectives(TEXT)) == 4


def test_a_loop_that_was_unrolled_runs_half_as_often():
    text = TEXT.replace(
        "ROOT %lt.2 = pred[] compare(%i, %limit.2)",
        "%i.2 = s32[] get-tuple-element(%p), index=1\n"
        "  ROOT %lt.2 = pred[] compare(%i.2, %limit.2)",
    ).replace(
        "  %p.1 = f32[6]",
        "  %two = s32[]{:T(128)} constant(2)\n"
        "  %next = s32[] add(%got, %two)\n"
        "  ROOT %out = (f32[], /*index=1*/s32[]) tuple(%kept, /*index=1*/%next)\n"
        "  %p.1 = f32[6]",
    )
    found = {one.kind: one for one in collectives(text)}
    assert found["collective-permute"].times == 3
    assert found["all-reduce"].times == 3 * 32


def test_an_exchange_in_several_fusions_counts_once():
    again = "  %g2 = bf16[16,16]{1,0} all-gather(%w), channel_id=7, replica_groups=[1,8]<=[8]\n"
    text = TEXT.replace("all-gather-start(%w), ", "all-gather-start(%w), channel_id=7, ")
    call = "  %f = bf16[16,16]{1,0} fusion(%w), kind=kCustom, calls=%fused\n"
    fused = "%fused (w: bf16[2,16]) -> bf16[16,16] {\n" + again + "}\n\n"
    found = collectives(text.replace("%inner_condition (", fused + "%inner_condition (").replace(
        "  %g = (bf16", call + "  %g = (bf16"
    ))  # fmt: skip
    assert sorted(one.kind for one in found) == sorted(one.kind for one in collectives(TEXT))
    # Programs of several slices give exchanges of one computation a channel together.
    other = again.replace("%g2 = bf16[16,16]", "%g3 = bf16[32,16]")
    found = collectives(text.replace("  %p.1 = f32", again + again.replace("g2", "g4") + other
                                     + "  %p.1 = f32"))  # fmt: skip
    gathers = sorted((one.shape, one.times) for one in found if one.kind == "all-gather")
    assert gathers == [((16, 16), 160), ((32, 16), 5)]
    alone = text.replace("channel_id=7, ", "channel_id=8, ")
    found = collectives(alone.replace("  %p.1 = f32", again + again.replace("g2", "g4")
                                      + "  %p.1 = f32"))  # fmt: skip
    assert sorted(one.times for one in found if one.shape == (16, 16)) == [5, 5, 160]


def test_several_arrays_at_once_and_all_devices():
    start = "  %s = (f32[1024]{0}, f32[1024]{0}) all-reduce-start(%p0, %p1), replica_groups={}\n"
    text = TEXT.replace("jit_step,", "jit_step, num_partitions=4,")
    one = collectives(text.replace("  %while.2 =", start + "  %while.2 ="))
    (both,) = [each for each in one if each.shape == (1024,)]
    # A ring sends each array 2 x 3/4 times.
    assert (both.size, both.group, both.moved) == (8192, 4, 12288)


def test_what_goes_between_slices_is_a_kind_of_its_own():
    attributes = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
    send = (
        "  %send = (f32[256,4]{1,0}, u32[], token[]) send(%r, %after), channel_id=4, "
        f"is_host_transfer=true, frontend_attributes={{{attributes}}}\n"
        "  %send-done = token[] send-done(%send), channel_id=4, is_host_transfer=true, "
        f"frontend_attributes={{{attributes}}}\n"
    )
    found = collectives(TEXT.replace("  %p.1 = f32", send + "  %p.1 = f32"))
    (own,) = [one for one in found if one.kind == BETWEEN_SLICES]
    assert (own.shape, own.size, own.times, own.moved) == ((256, 4), 4096, 5, 5 * 4096)


def test_a_call_over_several_lines_ends_no_loop():
    kernel = '  %k = f32[8]{0} custom-call(%x), backend_config={"a": {\n"b": 1\n}}, metadata={}\n'
    text = TEXT.replace("  %while.1", kernel + "  %while.1")
    assert sorted(one.kind for one in collectives(text)) == sorted(
        one.kind for one in collectives(TEXT)
    )


def test_a_loop_of_unknown_length_counts_as_told():
    text = TEXT.replace("%limit.2 = u32[]{:T(128)} constant(5)", "%limit.2 = parameter(1)")
    for unknown in (1, 7):
        found = {one.kind: one for one in collectives(text, unknown)}
        assert found["all-reduce"].times == 32 * unknown


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,8]<=[16]", 8),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1','axis_0'}", 8),
        ("@mesh['axis_0'=16], device_ids=([4,4]T(1,0)) {'axis_0':(2)4}", 4),
    ],
)
def test_devices_of_a_group(groups, devices):
    text = TEXT.replace("{{0,1,2,3},{4,5,6,7}}", groups)
    found = {one.kind: one for one in collectives(text)}
    assert found["all-reduce"].group == devices


def test_bytes_that_a_ring_moves():
    found = {one.kind: one.moved for one in collectives(TEXT)}
    assert found["all-reduce"] == pytest.approx(160 * 64 * 2 * 3 / 4)
    assert found["all-gather"] == pytest.approx(160 * 512 * 7 / 8)
    assert found["collective-permute"] == 5 * 24
    assert found["all-to-all"] == pytest.approx(32 / 2)


def test_a_gather_of_a_whole_weight_is_named():
    wholes = {"mlp/up": (1, 16, 16), "norm": (16,), "head": (16, 8)}
    ((name, one),) = gathers_of(collectives(TEXT), wholes)
    assert (name, one.shape) == ("mlp/up", (16, 16))


CODE = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from w2s_jax.ops.sharding import make_mesh
from w2s_jax.plan.compiled import collectives, gathers_of
mesh = make_mesh("data=2,tensor=4")
at = lambda *spec: NamedSharding(mesh, P(*spec))

def step(x, up, down):
    def body(x, _):
        return jnp.tanh(x @ up) @ down, None
    return jax.lax.scan(body, x, None, length=7)[0]

def given(up, down):
    shapes = [((8, 16), at("data", None)), ((16, 32), up), ((32, 16), down)]
    return [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=to) for shape, to in shapes]

shapes = given(at(None, "tensor"), at("tensor", None))
text = jax.jit(step, out_shardings=at("data", None)).lower(*shapes).compile().as_text()
(one,) = collectives(text)
assert (one.kind, one.times, one.group) == ("all-reduce", 7, 4), one
assert one.size == 256 and one.in_loop, one
# Widths split as in training: the weights are gathered in the loop, and that is told.
shapes = given(at("tensor", None), at(None, "tensor"))
def gathering(x, up, down):
    def body(x, _):
        whole = jax.lax.with_sharding_constraint(jnp.sin(up * x.sum()), at(None, None))
        return jnp.tanh(x @ whole) @ down, None
    return jax.lax.scan(body, x, None, length=7)[0]
text = jax.jit(gathering, out_shardings=at("data", None)).lower(*shapes).compile().as_text()
assert [n for n, _ in gathers_of(collectives(text), {"up": (16, 32)})], collectives(text)
print("read")
"""


def test_a_program_for_eight_devices(run_python):
    assert run_python(CODE, devices=8).endswith("read\n")
