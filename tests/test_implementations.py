"""The kernels of platforms behind exact attention: who serves, the same numbers, and that they compile."""

from __future__ import annotations

import functools
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import implementations, make
from fastformer.attention.implementations import Case, choose
from fastformer.attention.scores import Bend, Mask, reference_attention
from fastformer.core import mesh
from fastformer.core.seq import Seq, whole

ALIBI = Bend(slopes=(0.5, 0.25))


def case(platform, dtype=jnp.bfloat16, time=256, width=64, mask=Mask(), bend=Bend(), past=0, keys=None):
    shapes = (2, time, 2, width), (2, keys or time, 1, width), (2, keys or time, 1, width)
    return Case(platform, jnp.dtype(dtype), *shapes, mask, bend, past)


@pytest.mark.parametrize(
    "platform, changes, want",
    [
        ("cpu", {}, "xla"),
        ("tpu", {}, "pallas"),
        ("tpu", {"dtype": jnp.float32, "mask": Mask(True, 100), "bend": Bend(soft_cap=30.0)}, "pallas"),
        ("tpu", {"time": 130}, "xla"),
        ("tpu", {"bend": ALIBI}, "xla"),
        ("tpu", {"past": 128, "keys": 384}, "xla"),
        ("tpu", {"past": None}, "xla"),
        ("gpu", {}, "cudnn"),
        ("gpu", {"mask": Mask(True, 100)}, "cudnn"),
        ("gpu", {"dtype": jnp.float32}, "xla"),
        ("gpu", {"width": 72}, "cudnn"),
        ("gpu", {"width": 132}, "xla"),
        ("gpu", {"bend": Bend(soft_cap=30.0)}, "xla"),
        ("gpu", {"mask": Mask(False, 100)}, "xla"),
        ("gpu", {"mask": Mask(prefix=True)}, "xla"),
        ("tpu", {"mask": Mask(prefix=True)}, "xla"),
    ],
)
def test_the_first_that_can_serves(platform, changes, want):
    assert choose(case(platform, **changes)) == want


def test_one_that_cannot_says_why_and_the_next_is_tried():
    with pytest.warns(UserWarning, match="pallas cannot serve: .* run on TPUs, and this is cpu"):
        assert choose(case("cpu"), "pallas") == "xla"
    with pytest.warns(UserWarning, match="cudnn cannot serve: .* takes bfloat16 or float16, not float32"):
        assert choose(case("gpu", jnp.float32), "cudnn") == "xla"


def packed():
    segment, position = np.ones((2, 256), np.int32), np.tile(np.arange(256, dtype=np.int32), (2, 1))
    segment[0, 100:], segment[1, 240:] = 2, 0
    position[0, 100:] -= 100
    return Seq(jnp.asarray(segment), jnp.asarray(position))


@pytest.mark.parametrize(
    "mask, bend, shards",
    [
        (Mask(), Bend(), 1),
        (Mask(True, 70), Bend(soft_cap=2.0), 1),
        (Mask(False, 70), Bend(), 1),
        (Mask(), Bend(soft_cap=2.0), 2),  # a ring
        (Mask(False), Bend(), 2),
        (Mask(True, 70), Bend(), 2),  # what a window reaches is handed over
    ],
)
def test_the_tpu_kernel_is_the_reference(monkeypatch, mask, bend, shards):
    """Values and gradients of the Pallas kernel, interpreted on CPU, on packed rows with padding.

    Time is whole, or split over devices.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    interpreted = functools.partial(splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash, "make_splash_mha", interpreted)
    monkeypatch.setattr(implementations, "platform", lambda: "tpu")
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (
        jax.random.normal(key, (2, 256, heads, 24)) for key, heads in zip(keys, (2, 1, 1, 2))
    )
    seq = packed()
    weight = jnp.where((seq.segment_BT > 0)[..., None, None], weight, 0.0)

    def fast(q, k, v):
        return implementations.attend(q, k, v, (seq, seq), mask, bend)

    def slow(q, k, v):
        return reference_attention(q, k, v, seq, seq, mask, bend)

    def pull(attend):
        return jax.value_and_grad(lambda *a: jnp.sum(attend(*a) * weight), (0, 1, 2))(q, k, v)

    assert choose(Case("tpu", q.dtype, q.shape, k.shape, v.shape, mask, bend, 0)) == "pallas"
    grid = mesh.make_mesh(mesh.MeshConfig(1, 1, 1, shards), jax.devices()[:shards])
    with mesh.use(grid, mesh.rules({"T": ("sequence",)})):
        got = jax.jit(lambda: pull(fast))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(pull(slow)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install libtpu")
@pytest.mark.parametrize("name, axes", [("local", (2, 2, 1)), ("softmax", (1, 2, 2)), ("local", (1, 2, 2))])
def test_compiles_for_a_tpu_ahead_of_time(monkeypatch, name, axes):
    """Forward and backward for a v5e slice that is not here, split over rows, heads and time: kernels."""
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other test processes compile beside this one
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    data, tensor, sequence = axes
    grid = mesh.make_mesh(mesh.MeshConfig(data, 1, tensor, sequence), devices)
    letters = {"B": ("data", "fsdp"), "H": ("tensor",), "G": ("tensor",)}
    rules = mesh.rules(letters | dict.fromkeys("TS", ("sequence",)))
    mixer = make(name, {}, {"heads": 4, "kv_heads": 2, "head_width": 64, "dtype": jnp.bfloat16})
    x = jax.ShapeDtypeStruct((2, 1024, 256), jnp.bfloat16)
    seq = jax.eval_shape(lambda: whole(2, 1024))
    params = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, seq))

    def loss(params, x, seq):
        return mixer.apply(params, x, seq)[0].astype(jnp.float32).sum()

    with mesh.use(grid, rules):
        row = mesh.batch_sharding(grid, rules)
        place = [jax.NamedSharding(grid, jax.P()), row, row]
        step = jax.jit(jax.grad(loss), in_shardings=place)
        compiled = step.lower(params, x, seq).compile()
    text = compiled.as_text()
    # Forward, dq, dk with dv; in a ring of a shard's own keys and of those of others.
    assert text.count("tpu_custom_call") >= (6 if name == "softmax" else 3)
    assert ("collective-permute" in text) == (sequence > 1)


def test_lowers_to_cudnn(monkeypatch):
    """On a machine without a GPU: with JAX's look for cuDNN put aside, the program holds its kernels."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 90900)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(implementations, "platform", lambda: "gpu")
    seq = whole(2, 256)
    q = k = v = jnp.zeros((2, 256, 4, 64), jnp.bfloat16)

    def loss(q, k, v):
        return implementations.attend(q, k, v, (seq, seq), Mask(True, 100)).astype(jnp.float32).sum()

    kernels = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in kernels]
    lowered = jax.export.export(jax.jit(jax.grad(loss)), platforms=["cuda"], disabled_checks=checks)(q, k, v)
    for name in kernels:
        assert name in str(lowered.mlir_module())
