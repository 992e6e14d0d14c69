"""Fourier mixing against transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import make
from fastformer.core.seq import whole

torch = pytest.importorskip("torch", reason="pip install torch==2.13.0 transformers")
transformers = pytest.importorskip("transformers", reason="pip install torch==2.13.0 transformers")

pytestmark = pytest.mark.oracle

WIDTH, TIME = 24, 37


def test_fnet_is_that_of_transformers():
    from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform

    config = transformers.FNetConfig(hidden_size=WIDTH, use_tpu_fourier_optimizations=False)
    theirs = FNetBasicFourierTransform(config)
    x = np.random.default_rng(0).normal(size=(2, TIME, WIDTH)).astype(np.float32)
    tensor = torch.tensor(x, requires_grad=True)
    want = theirs(tensor)[0]
    weights = np.cos(np.arange(want.numel())).reshape(want.shape).astype(np.float32)
    (want * torch.tensor(weights)).sum().backward()

    layer = make("fnet", {}, {"heads": 4, "head_width": 6, "bidirectional_mode": True})
    got = layer.apply({}, jnp.asarray(x), whole(2, TIME))[0]
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-4)
    pull = jax.grad(lambda x: jnp.sum(layer.apply({}, x, whole(2, TIME))[0] * weights))(jnp.asarray(x))
    np.testing.assert_allclose(pull, tensor.grad.numpy(), atol=1e-4)
