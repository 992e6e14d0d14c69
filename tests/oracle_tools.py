"""What tests against torch share: weights carried over, then values and all gradients compared."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import Mixer, make
from fastformer.core.seq import whole

torch = pytest.importorskip("torch", reason="pip install torch==2.13.0 transformers")

torch.set_num_threads(1)  # tests already share the cores

BATCH, TIME, WIDTH, HEADS = 2, 70, 32, 4


def array(tensor) -> np.ndarray:
    """Return what a tensor holds, float32."""
    return tensor.detach().numpy().astype(np.float32)


def slope(tensor) -> np.ndarray:
    """Return the gradient that reached a tensor, float32."""
    return array(tensor.grad)


def turned(weight: np.ndarray, *sizes: int) -> np.ndarray:
    """Return torch's ``[out, in]`` as ``[in, *sizes]``."""
    return weight.T.reshape(weight.shape[1], *sizes)


def taps(weight: np.ndarray) -> np.ndarray:
    """Return torch's ``[R, 1, W]``, oldest token first, as ``[W, R]``, newest first."""
    return weight[:, 0, ::-1].T


def scattered(layer):
    """Return the layer in float32 with every parameter random: many start at zero, one or undefined."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.4
        noise = spread * torch.randn(parameter.shape, generator=generator)
        parameter.data = noise + (1.0 if name.endswith("norm.weight") else 0.0)
    return layer.eval()


def mixer_of(name: str, options: dict, **shared) -> Mixer:
    """Return a mixer of the size that these tests use."""
    return make(name, options, {"heads": HEADS, "head_width": 8, **shared})


def drawn(mixer: Mixer) -> dict:
    """Return the mixer's parameters as float64 tensors, every one moved off its initial value."""
    x, seq = jnp.zeros((1, 2, WIDTH)), whole(1, 2)
    params = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x, seq)["params"])
    generator = torch.Generator().manual_seed(0)

    def moved(leaf):
        leaf = torch.tensor(np.asarray(leaf), dtype=torch.float64)
        spread = 0.05 if leaf.ndim > 2 else 0.3
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        return (leaf + spread * noise).requires_grad_()

    return jax.tree.map(moved, params)


def inputs() -> np.ndarray:
    """Return x_BTD."""
    return np.random.default_rng(0).standard_normal((BATCH, TIME, WIDTH)).astype(np.float32)


def agree(mixer: Mixer, carry, oracle, tolerance: float = 1e-4) -> None:
    """Check values and the gradients to the input and to every parameter.

    Args:
      carry: ``carry(read)`` returns the mixer's parameters, each by ``read(tensor)`` of the oracle's.
      oracle: from a tensor x_BTD to a tensor y_BTD.
    """
    x, seq = inputs(), whole(BATCH, TIME)
    shapes = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, seq)["params"])
    params = carry(array)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)

    tensor = torch.tensor(x, requires_grad=True)
    value = oracle(tensor)
    weight = np.cos(np.arange(x.size)).reshape(x.shape).astype(np.float32)
    (value * torch.tensor(weight)).sum().backward()
    want = {"y": array(value), "x": slope(tensor), "params": carry(slope)}

    @jax.jit
    def run(params, x):
        y, pull = jax.vjp(lambda params, x: mixer.apply({"params": params}, x, seq)[0], params, x)
        to_params, to_x = pull(jnp.asarray(weight))
        return {"y": y, "x": to_x, "params": to_params}

    found = jax.tree.leaves_with_path(run(params, x))
    for (path, got), expected in zip(found, jax.tree.leaves(want), strict=True):
        where, largest = jax.tree_util.keystr(path), np.abs(expected).max()
        assert largest > 1e-2, f"{where} is checked against nothing"
        np.testing.assert_allclose(got, expected, atol=tolerance * max(1.0, largest), rtol=0, err_msg=where)
