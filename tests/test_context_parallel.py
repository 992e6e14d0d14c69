"""Rows whose time is split over devices are the rows on one: losses, gradients, and what is sent."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from tiny import configured

from fastformer.core.errors import UserError
from fastformer.core.mesh import use
from fastformer.core.trees import paths
from fastformer.report.collectives import traffic
from fastformer.train.gradients import make_gradients
from fastformer.train.optimiser import make_optimiser
from fastformer.train.setup import build_run
from fastformer.train.state import abstract_state, initial_state
from fastformer.train.step import put_batch

TIME = 48  # six tokens a device where all eight split it: less than the window of local
MIXERS = ("softmax", "local", "gated_delta", "mamba2")  # ring, halo, passing of a matrix, of decays
ONE = (1, 1, 1, 1)
MESHES = {
    "data": ((8, 1, 1, 1), ("softmax",)),
    "fsdp": ((1, 8, 1, 1), ("softmax",)),
    "tensor": ((1, 1, 2, 1), ("softmax",)),
    "sequence": ((1, 1, 1, 8), MIXERS),
    "all": ((1, 2, 2, 2), MIXERS),
}


def gradients_of(folder, mesh, mixers):
    """Return the loss and gradients of a packed batch on a mesh, and the compiled program's text."""
    axes = zip(("mesh__data", "mesh__fsdp", "mesh__tensor", "mesh__sequence"), mesh)
    model = {"model__pattern": mixers, "model__layers": len(mixers), "model__heads": 4, "model__kv_heads": 2}
    model |= {"model__attention__window": 9} if "local" in mixers else {}
    model |= {"model__loss_chunk": 24, "data__length": TIME, "sharding__V": ()}
    run = build_run(configured(folder, **dict(axes), **model), folder, jax.devices()[: int(np.prod(mesh))])
    batch = next(run.data.train_iterator(8, 0)) | packed(8)
    with use(run.mesh, run.rules):
        tx, _ = make_optimiser(run.config)
        params = initial_state(run, tx, abstract_state(run, tx)).params
        args = (params, put_batch(run, batch), jax.random.key(0))
        compiled = jax.jit(make_gradients(run)).lower(*args).compile()
        return jax.device_get(compiled(*args)), compiled.as_text()


def packed(rows):
    """Return rows of segments that cross the borders of shards, are shorter than one, and end in padding."""
    segment_BT = np.zeros((rows, TIME), np.int32)
    position_BT = np.zeros((rows, TIME), np.int32)
    for row in range(rows):
        start = 0
        for segment, size in enumerate((5 + row, 1, 27, 3, 40), 1):
            end = min(start + size, TIME - row % 3 * 4)
            segment_BT[row, start:end] = segment
            position_BT[row, start:end] = np.arange(end - start)
            start = end
    weights_BT = (segment_BT > 0).astype(np.float32)
    return {"segment_BT": segment_BT, "position_BT": position_BT, "weights_BT": weights_BT}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    one = {mixers: gradients_of(folder, ONE, mixers)[0] for mixers in (("softmax",), MIXERS)}
    many = {name: gradients_of(folder, *case) for name, case in MESHES.items()}
    return {name: (one[MESHES[name][1]], *found) for name, found in many.items()}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_neither_loss_nor_gradients(outcomes, name):
    one, many, _ = outcomes[name]
    np.testing.assert_allclose(one.loss, many.loss, rtol=1e-5)
    assert one.targets == many.targets > 0
    for (path, a), b in zip(paths(one.mean).items(), jax.tree.leaves(many.mean), strict=True):
        # Sums of 384 tokens in another order, through four mixers: machines differ by 2e-5 of the largest.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4 * np.abs(a).max(), err_msg=path)


def test_neighbours_hand_over_and_nobody_gathers_time(outcomes):
    """Keys and values go from device to device; of all tokens only their numbers are brought together."""
    program = outcomes["sequence"][2]
    assert traffic(program)["collective-permute"].calls > 0
    gathered = re.findall(r"= \(?(?:f32|bf16|pred)\[([\d,]*)\]\S* all-gather", program)
    assert gathered and not [shape for shape in gathered if str(TIME) in shape.split(",")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model__attention__name": "topk"},
            r"config.model.attention.name: topk cannot split rows in time over config.mesh.sequence; "
            "variants that are context_parallel: softmax, latent, local, linear,.* gated_delta",
        ),
        ({"data__length": 18}, "config.data.length: 18 does not split over the 4 devices of sequence"),
    ],
)
def test_what_cannot_be_split_says_so(tmp_path, settings, message):
    config = configured(tmp_path, mesh__sequence=4, mesh__data=2, sharding__V=(), **settings)
    with pytest.raises(UserError, match=message) as error:
        build_run(config, tmp_path)
    assert "\n" not in str(error.value)
