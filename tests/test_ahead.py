"""What a program sends, read from its text; the train step compiled for TPUs that are not here."""

from __future__ import annotations

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import tiny_config, use_variant

from fastformer.attention import VARIANTS
from fastformer.core.config import set_key
from fastformer.core.errors import UserError
from fastformer.core.mesh import MeshConfig, make_mesh
from fastformer.report.collectives import traffic
from fastformer.report.roofline import CHIPS, estimate
from fastformer.train import ahead as ahead_of_time
from fastformer.train.ahead import compile_for, describe, devices_of

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")

# As XLA writes for TPUs, but shorter: a loop whose turns only its counter tells, a kernel's own lines.
PROGRAM = """HloModule jit_step

%body.1 (p: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %p = (u32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %two = u32[]{:T(128)} constant(2)
  %x = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %k = bf16[8,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel={
"a": 1
}}, metadata={op_name="kernel"}
  %s = (bf16[8,4]{1,0}, bf16[8,4]{1,0:T(8)S(1)}, u32[], u32[]) collective-permute-start(%k), \
source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %t = (u32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%next, %k)
}

%cond.1 (p: (u32[], bf16[8,4])) -> pred[] {
  %n = u32[]{:T(128)} constant(8)
  %p = (u32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main.1 (a: f32[16]) -> f32[16] {
  %g = f32[16]{0} all-gather(%a), replica_groups=mesh['x'=2,'y'=2] {'x'}, dimensions={0}
  %r = f32[16]{0} all-reduce(%g), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %c = f32[4]{0} reduce-scatter(%r), replica_groups={{0,1,2,3}}, to_apply=%add
  %w = (u32[]{:T(128)}, bf16[8,4]{1,0}) while(%init), condition=%cond.1, body=%body.1
}
"""


def test_what_a_program_sends():
    found = traffic(PROGRAM, per_slice=2)
    permute = found["collective-permute"]
    assert (permute.calls, permute.bytes) == (4, 4 * 64)  # 0, 2, 4, 6; 32 bfloat16 each
    assert found["all-gather"] == (1, 32.0, 32.0)  # half of 64 bytes, from 2 in the other slice
    assert found["all-reduce"] == (1, 64.0, 64.0)  # there and back; groups of 0, 2 and 1, 3
    assert found["reduce-scatter"] == (1, 48.0, 48.0)
    near = traffic(PROGRAM.replace("{'x'}", "{'y'}"), per_slice=2)["all-gather"]
    assert (near.bytes, near.far_bytes) == (32.0, 0.0)
    assert not any(kind.far_bytes for kind in traffic(PROGRAM).values())


def test_a_collective_in_several_fusions_is_one():
    """Started before a loop, and a part of it sent in every turn; others may have the same channel too."""
    gather = "= f32[16]{0} all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}"
    for chain, calls in ((', frontend_attributes={chain_id="0"}', 1), ("", 1 + 4)):
        line = f"{gather}{chain}\n"
        program = PROGRAM.replace("  %next", f"  %part {line}  %next").replace("  %r", f"  %start {line}  %r")
        before, found = (traffic(text)["all-gather"] for text in (PROGRAM, program))
        assert program.count("channel_id=7") == 2
        assert (found.calls - before.calls, found.bytes - before.bytes) == (calls, calls * 48.0)


@pytest.mark.parametrize(
    ("kind", "result", "start", "sent"),
    [
        ("all-reduce", "(f32[10], f32[20])", "(f32[10], f32[20])", 2 * 120 * 0.75),
        ("all-gather", "(f32[40], f32[80])", "((f32[10], f32[20]), (f32[40], f32[80]))", 480 * 0.75),
        ("collective-permute", "f32[40]", "(f32[40], f32[40], u32[], u32[])", 160.0),
    ],
)
def test_what_is_sent_meanwhile_is_as_much(kind, result, start, sent):
    for shape, name in ((result, kind), (start, f"{kind}-start")):
        line = f"  %r = {shape} {name}(%a, %b), channel_id=1, replica_groups=[1,4]<=[4]"
        found = traffic(f"HloModule m\n\nENTRY %main (a: f32[1]) -> f32[1] {{\n{line}\n}}\n")
        assert found == {kind: (1, sent, 0.0)}


def test_what_goes_to_other_slices_through_hosts():
    send = "%s = (f32[16], u32[], token[]) send(%a, %t), channel_id=4, is_host_transfer=true, "
    send += 'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE",is_spmd_generated="true"}\n'
    found = traffic(PROGRAM.replace("  %next", f"  {send}  %next"), per_slice=2)["all-reduce"]
    assert found == (1 + 4, 64.0 + 4 * 64, 64.0 + 4 * 64)


def test_turns_that_cannot_be_told_are_not_guessed():
    with pytest.raises(ValueError, match="number of turns is not known"):
        traffic(PROGRAM.replace("direction=LT", "direction=NE"))


def test_a_scan_is_multiplied_out():
    mesh = make_mesh(MeshConfig(8, 1, 1))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

    def fn(x, w):
        def turn(w, _):
            return w + jnp.sum(x * w[None], axis=0), None

        return jax.lax.scan(turn, w, None, length=5)[0]

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=s) for shape, s in (((8, 3), split), ((3,), whole))
    ]
    text = jax.jit(fn, out_shardings=whole).lower(*shapes).compile().as_text()
    assert traffic(text)["all-reduce"] == (5, 5 * 2 * 12 * 7 / 8, 0.0)


def test_the_estimate_is_bound_by_the_slowest_part():
    chip = CHIPS["v5e"]
    one = estimate(chip, flops=chip.flops, useful=chip.flops / 2, moved=chip.hbm_speed / 4, near=0, far=0)
    assert (one.best, one.worst, one.bound, one.useful / one.best) == (1.0, 1.25, "compute", 0.5)
    assert estimate(chip, 0, 0, 0, near=0, far=1e10).bound == "far"


def ahead(folder, **settings):
    """Return the tiny configuration as a pod might have it."""
    config = tiny_config(folder)
    settings = {"mesh.data": 1, "mesh.fsdp": -1, "model.scan": True, "model.layers": 2} | settings
    for key, value in settings.items():
        set_key(config, key, value)
    return config


@needs_libtpu
def test_a_step_compiled_for_a_pod(tmp_path):
    found = compile_for(ahead(tmp_path), "v5e:2x2")
    assert found["devices"] == 4 and found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "sequence": 1}
    # Embedding and matrices lie in quarters, norms and biases too: all have an axis D.
    assert found["bytes"]["parameters"] == found["parameters"] * 4 // 4
    assert (
        2 * found["bytes"]["parameters"] <= found["bytes"]["optimiser"] < 2.1 * found["bytes"]["parameters"]
    )
    assert found["flops"] >= found["useful_flops"] > 6 * found["parameters"] * 8 * 16 * 0.9
    assert found["traffic"] and found["peak"] < found["hbm"]
    text = describe(found)
    assert "It fits. Estimate, not a measurement" in text and json.dumps(found)


@needs_libtpu
def test_slices_hold_copies(tmp_path):
    _, devices, per_slice = devices_of("2*v5e:2x2")
    mesh = make_mesh(MeshConfig(2, -1, 1), devices)
    assert per_slice == 4 and mesh.shape == {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
    for copy in mesh.devices:
        assert len({device.slice_index for device in copy.flat}) == 1
    with pytest.raises(UserError, match="config.mesh.data: 1 is no multiple of the 2 slices"):
        make_mesh(MeshConfig(1, -1, 1), devices)


def test_what_the_compiler_has_no_room_for_does_not_fit():
    error = RuntimeError("RESOURCE_EXHAUSTED: Used 15.88G of 15.75G hbm. Exceeded hbm capacity by 130M.")
    assert ahead_of_time._needed(error) == {"peak": 15.88 * 2.0**30, "hbm": 15.75 * 2.0**30}
    with pytest.raises(RuntimeError, match="another"):
        ahead_of_time._needed(RuntimeError("another"))


def test_of_a_plan_the_precision_that_needs_most_is_told(tmp_path, monkeypatch):
    peaks = {"fp8": 2, "float32": 3, "bfloat16": 1}
    monkeypatch.setattr(ahead_of_time, "_compile", lambda config, topology, policy: {"peak": peaks[policy]})
    plan = tuple((policy, 1) for policy in peaks)
    assert compile_for(ahead(tmp_path, **{"train.precision": plan}), "v5e:2x2") == {"peak": 3}
    assert compile_for(ahead(tmp_path, **{"model.dtype": "bfloat16"}), "v5e:2x2") == {"peak": 1}


def test_what_does_not_fit_says_what_helps():
    found = {"name": "n", "topology": "t", "mesh": {"data": 1}, "devices": 1, "parameters": 1, "bytes": {}}
    found |= {"peak": 2e10, "hbm": 1.6e10, "flops": 1, "useful_flops": 1}
    assert "It does not fit: 20 GB of 16 GB. What helps, in this order: config.model.remat" in describe(found)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e", "--topology: 'v5e' is not CHIP:AxB"),
        ("v5e:0x4", "--topology: 'v5e:0x4' is not CHIP:AxB"),
        ("v9:2x2", "--topology: 'v9' is unknown"),
        pytest.param("v5e:3x7", "--topology: 'v5e:3x7' cannot be had", marks=needs_libtpu),
    ],
)
def test_topologies_that_cannot_be(topology, message):
    with pytest.raises(UserError, match=message) as error:
        devices_of(topology)
    assert "\n" not in str(error.value)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_compiles_for_a_pod(name, tmp_path):
    config = ahead(tmp_path, **{"data.length": 256})
    use_variant(config, name)
    found = compile_for(config, "v5e:2x2")
    assert found["flops"] >= found["useful_flops"] > 0 and found["traffic"] and found["peak"] < found["hbm"]
