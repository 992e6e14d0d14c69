"""The wrapper's options on every row of the table: none of them is silently left out."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import VARIANTS, make
from fastformer.core.errors import FieldError
from fastformer.core.seq import Seq, whole

TIME, WIDTH = 20, 12
# The parameters that an option brings, by a part of their names.
BRINGS = {"short_conv": ("conv", "taps"), "qk_norm": ("query_norm", "key_norm"), "output_gate": ("gate",)}
# Rows without queries and keys; their docstrings say so.
NOTHING = {("fnet", "short_conv"), ("fnet", "qk_norm"), ("hyena", "qk_norm"), ("rg_lru", "qk_norm")}
REFUSED = {("latent", "qk_norm")}  # its latents are normed instead
VALUES = {"short_conv": 4, "qk_norm": True, "output_gate": True}


def mixer(name, **shared):
    fields = {"heads": 4, "kv_heads": 2, "head_width": 6, "length": TIME, "short_conv": 0}
    mode = {"bidirectional_mode": not VARIANTS[name].causal}
    return make(name, VARIANTS[name].small, fields | mode | shared)


@functools.cache
def parameters(name, **shared):
    """Return the names of a layer's parameters."""
    init, x = mixer(name, **shared).init, jnp.zeros((1, 2, WIDTH))
    shapes = jax.eval_shape(init, jax.random.key(0), x, whole(1, 2))
    return {"/".join(key.key for key in path[1:-1]) for path, _ in jax.tree.leaves_with_path(shapes)}


@pytest.mark.parametrize("option", BRINGS)
@pytest.mark.parametrize("name", VARIANTS)
def test_an_option_brings_its_parameters_or_is_said_to_do_nothing(name, option):
    try:
        new = parameters(name, **{option: VALUES[option]}) - parameters(name)
    except FieldError as error:
        assert (name, option) in REFUSED and error.field == option
        return
    found = any(part in parameter for parameter in new for part in BRINGS[option])
    if (name, option) in NOTHING:
        assert not new and f"``{option}``" in VARIANTS[name].__doc__
    else:
        assert found, f"{name} takes {option} and does nothing with it"


@pytest.mark.parametrize(
    "field, value, line",
    [
        ("kv_heads", 3, "kv_heads: 3 is not allowed; it must be a divisor of the 4 heads"),
        ("kv_heads", -2, "kv_heads: -2 is not allowed"),
        ("heads", 0, "heads: 0 is not allowed; it must be 1 or more"),
        ("head_width", 0, "head_width: 0 is not allowed"),
        ("soft_cap", -3.0, "soft_cap: -3.0 is not allowed; it must be above 0, or 0 for none"),
        ("short_conv", -7, "short_conv: -7 is not allowed"),
    ],
)
def test_impossible_shared_fields_are_refused(field, value, line):
    with pytest.raises(FieldError) as caught:
        mixer("softmax", **{field: value})
    assert str(caught.value).startswith(line)


def test_rotary_positions_of_an_odd_head_width_are_refused():
    layer = mixer("softmax", head_width=7, positions="rope")
    with pytest.raises(FieldError, match="positions: 'rope' is not allowed; .* as 7 is"):
        layer.init(jax.random.key(0), jnp.zeros((1, 2, WIDTH)), whole(1, 2))


@pytest.mark.parametrize("name", ["softmax", "longformer"])
def test_a_short_convolution_before_attention_in_both_directions(name):
    """It looks back within a segment, whatever else stands in the row; of global projections too."""
    layer = mixer(name, short_conv=4, bidirectional_mode=True)
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, TIME, WIDTH)))
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(1), x, whole(1, TIME)))
    segment = np.array([[1] * 7 + [0] * 2 + [2] * 11], np.int32)
    position = np.array([[*range(7), 0, 0, *range(11)]], np.int32)
    apply = jax.jit(lambda params, x, seq: layer.apply(params, x, seq)[0])
    packed = apply(params, np.where(segment[..., None] > 0, x, np.nan), Seq(segment, position))
    for start, end in ((0, 7), (9, TIME)):
        alone = apply(params, x[:, start:end], whole(1, end - start))
        np.testing.assert_allclose(packed[:, start:end], alone, atol=2e-5)
    taps = [path for path, _ in jax.tree.leaves_with_path(params) if "taps" in str(path[-1])]
    assert len(taps) == (2 if name == "longformer" else 1)
