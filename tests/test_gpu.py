"""On a GPU, where there is one: JAX_PLATFORMS=cuda python -m pytest tests/test_gpu.py

Every variant is its reference there too, cuDNN's kernels are the blocked form, a run trains in each dtype.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_laws import HEAD, NAMES, close, inputs, packed, value_and_gradients
from tiny import configured

from fastformer.attention.implementations import Case, attend, choose
from fastformer.attention.scores import Bend, Mask, reference_attention
from fastformer.core.seq import Seq, whole
from fastformer.train import loop

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
TIME = 129


@pytest.fixture(autouse=True)
def whole_products():
    """Products of float32 in float32: a GPU's default cuts them to 10 bits of mantissa (TF32)."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_is_its_reference(name):
    x, seq = inputs(2, TIME), packed(TIME)
    fast = value_and_gradients(name, x, seq)
    close(fast, value_and_gradients(name, x, seq, implementation="reference"), 2e-4)


def padded():
    segment = np.ones((2, 256), np.int32)
    segment[1, 200:] = 0
    return Seq(segment, np.tile(np.arange(256, dtype=np.int32), (2, 1)))


@pytest.mark.parametrize("seq", [whole(2, 256), padded()], ids=["whole", "padded"])
@pytest.mark.parametrize("mask", [Mask(), Mask(True, 100), Mask(False)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn_is_the_reference(dtype, mask, seq):
    """Values and gradients, as far as numbers of 8 and 11 bits go."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (4, 2, 2, 4)
    q, k, v, weight = (jax.random.normal(key, (2, 256, h, 64)).astype(dtype) for key, h in zip(keys, heads))
    weight = jnp.where((seq.segment_BT > 0)[..., None, None], weight, 0)
    assert choose(Case("gpu", jnp.dtype(dtype), q.shape, k.shape, v.shape, mask, Bend(), 0)) == "cudnn"

    def pull(function, *qkv):
        y, back = jax.vjp(function, *qkv)
        return jax.tree.leaves((jnp.where(weight == 0, 0, y), back(weight.astype(y.dtype))))

    got = jax.jit(lambda *qkv: pull(lambda q, k, v: attend(q, k, v, (seq, seq), mask), *qkv))
    assert "cudnn" in got.lower(q, k, v).as_text()
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    want = pull(lambda q, k, v: reference_attention(q, k, v, seq, seq, mask, Bend()), *wide)
    for a, b in zip(got(q, k, v), want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < (2e-2 if dtype == "bfloat16" else 3e-3) * np.linalg.norm(b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "fp8"])
def test_a_run_trains(dtype, tmp_path):
    config = configured(tmp_path, model__dtype=dtype, model__width=HEAD * 8, model__short_conv=4)
    loop.train(config, tmp_path / "run", jax.devices()[:1])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
