"""Less memory, the same numbers: parts of a batch, rematerialisation, scanned layers, chunks of the loss."""

from __future__ import annotations

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, use_variant

from configs import base
from fastformer import models
from fastformer.attention import VARIANTS
from fastformer.core import config as configuration
from fastformer.core.errors import UserError
from fastformer.core.mesh import MeshConfig, make_mesh, rules, shardings, use
from fastformer.core.seq import Seq, whole
from fastformer.core.trees import SCANNED, paths
from fastformer.models.stack import unstack
from fastformer.report.cost import flops
from fastformer.train.gradients import make_gradients
from fastformer.train.optimiser import make_optimiser
from fastformer.train.setup import build_run
from fastformer.train.state import abstract_state, initial_state
from fastformer.train.step import compile_train_step, put_batch

VOCABULARY, BATCH, TIME = 211, 2, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


def close(a, b, rtol=2e-5, atol=2e-6):
    for (path, x), y in zip(paths(a).items(), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=path)


def stack(params, period):
    """Return the parameters of a model as those of the same model with layers scanned by ``period``."""
    layers = sum(name.startswith("layer_") for name in params)

    def join(slot):
        return jax.tree.map(
            lambda *x: jnp.stack(x), *(params[f"layer_{i}"] for i in range(slot, layers, period))
        )

    rest = {name: value for name, value in params.items() if not name.startswith("layer_")}
    return rest | {SCANNED: {f"layer_{slot}": join(slot) for slot in range(period)}}


def settled(config, settings):
    for key, value in settings.items():
        configuration.set_key(config, key, value)
    return config


# Parts of a batch


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_gradient_of_the_parts_is_that_of_the_batch(folder, mesh):
    """Rows are packed, and the parts have very different numbers of targets."""
    devices = jax.devices()[: int(np.prod(mesh))]
    mesh = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh)) | {"sharding.V": ()}
    run = build_run(settled(tiny_config(folder), {"train.batch": 16, **mesh}), folder, devices)
    parts = dataclasses.replace(run, config=settled(run.config.copy_and_resolve_references(), ACCUMULATE))
    row_B1, time_1T = np.arange(16)[:, None], np.arange(16)[None]
    cut_B1 = 3 + row_B1 % 9
    weights_BT = ((row_B1 % 4 == 1) | (row_B1 == 0) & (time_1T < 3)).astype(np.float32)
    batch = dict(next(run.data.train_iterator(16, 0)), weights_BT=weights_BT)
    batch["segment_BT"] = (1 + (time_1T >= cut_B1)).astype(np.int32)
    batch["position_BT"] = (time_1T - cut_B1 * (time_1T >= cut_B1)).astype(np.int32)
    with use(run.mesh, run.rules):
        tx, _ = make_optimiser(run.config)
        params = initial_state(run, tx, abstract_state(run, tx)).params
        batch, key = put_batch(run, batch), jax.random.key(0)
        one, other = (jax.jit(make_gradients(r))(params, batch, key) for r in (run, parts))
    assert float(one.targets) == weights_BT.sum() > 3
    close(one, other)


ACCUMULATE = {"train.accumulate": 4, "train.batch": 16}


def test_parts_that_cannot_be(folder):
    with pytest.raises(UserError, match="config.train.accumulate: 3 .* divides config.train.batch, 8"):
        build_run(settled(tiny_config(folder), {"train.accumulate": 3}), folder)
    with pytest.raises(UserError, match="train.batch / config.train.accumulate: 4 does not split over the 8"):
        build_run(settled(tiny_config(folder), {"train.accumulate": 2}), folder)


# Models: the same function however it remembers


def built(**model):
    """Return a small model, its weights, a packed batch and ``params -> (nats, gradients)``."""
    c = base.get_config()
    c.model.layers, c.model.width, c.model.heads, c.model.ff_width = 2, 16, 2, 32
    for key, value in model.items():
        c.model[key] = value
    made = models.build(c, VOCABULARY, TIME)
    tokens_BT = jax.random.randint(jax.random.key(1), (BATCH, TIME), 0, VOCABULARY)
    segment_BT = 1 + (jnp.arange(TIME)[None] >= jnp.asarray([[7], [15]])).astype(jnp.int32)
    start_BT = jnp.where(segment_BT == 2, jnp.asarray([[7], [15]]), 0)
    seq = Seq(segment_BT, jnp.arange(TIME)[None] - start_BT)

    def nats(params):
        return made.apply({"params": params}, tokens_BT, seq, targets_BT=(tokens_BT + 1) % VOCABULARY)[
            0
        ].mean()

    # Numbers of any kind do, and the initial ones take long to compile.
    rng, shapes = np.random.default_rng(0), jax.eval_shape(made.init, jax.random.key(0), tokens_BT, seq)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.0, 0.2, x.shape), x.dtype), nn.unbox(shapes))
    return made, params["params"], tokens_BT, jax.jit(jax.value_and_grad(nats))


@pytest.fixture(scope="module")
def plain():
    _, params, _, fn = built()
    return params, fn(params), flops(fn, params), temporaries(fn, params)


def temporaries(fn, *args):
    return fn.lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_what_is_computed_again_is_the_same(plain):
    params, expected, work, memory = plain
    again = {}
    for remat in (("full",), ("dots",), ("full", "none")):
        _, _, _, fn = built(remat=remat)
        close(expected, fn(params))
        again[remat] = flops(fn, params) - work
        assert temporaries(fn, params) < memory
    assert again["full",] == 2 * again["full", "none"] > 2 * again["dots",] > 0


@pytest.mark.parametrize(
    ("model", "period"),
    [
        ({"layers": 4, "pattern": ("local", "softmax"), "attention": {"name": "local", "window": 4}}, 2),
        ({"layers": 4, "attention": {"name": "linear"}, "remat": ("dots", "none")}, 2),
    ],
    ids=["pattern", "recurrence"],
)
def test_scanned_layers_are_the_layers(model, period):
    made, params, tokens_BT, fn = built(**model)
    scanned, own, _, scanned_fn = built(**model, scan=True)
    stacked = stack(params, period)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, own)
    close(unstack(stacked), params, 0, 0)
    nats, gradients = fn(params)
    nats_scanned, gradients_scanned = scanned_fn(stacked)
    np.testing.assert_allclose(nats, nats_scanned, rtol=1e-5)
    close(gradients, unstack(gradients_scanned), 1e-4, 1e-5)
    state, states = made.init_state(BATCH, TIME), scanned.init_state(BATCH, TIME)
    one, other = jax.jit(made.apply), jax.jit(scanned.apply)
    for start in (0, 1, 2):
        part = tokens_BT[:, start : start + 1], whole(BATCH, 1, start)
        logits, state = one({"params": params}, *part, state)
        logits_scanned, states = other({"params": stacked}, *part, states)
        np.testing.assert_allclose(logits, logits_scanned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_layout_when_scanned(name, folder):
    """No parameter has twice the same letter, that of the layers in front included."""
    config = settled(tiny_config(folder), {"model.scan": True, "model.layers": 2})
    use_variant(config, name)
    model = models.build(config, VOCABULARY, 16)
    boxed = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((BATCH, 16), jnp.int32), whole(BATCH, 16))
    )
    mesh = make_mesh(MeshConfig(2, 2, 2))
    found = shardings(boxed, mesh, rules(config.sharding))
    assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(nn.unbox(boxed)))


def test_a_scanned_stack_is_one_body_however_deep():
    def lines(layers, scan):
        _, params, _, fn = built(layers=layers, scan=scan)
        return len(fn.lower(params).as_text().splitlines())

    assert lines(8, True) == lines(2, True) < lines(2, False) * 1.5


def test_layers_start_with_different_weights():
    made = built(scan=True)[0]
    params = nn.unbox(jax.jit(made.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), whole(1, 2)))
    weight = params["params"]["layers"]["layer_0"]["mlp"]["up"]["weight"]
    assert weight.shape == (2, 16, 32) and np.abs(weight[0] - weight[1]).max() > 0.1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"scan": True, "pattern": ("softmax",) * 3}, "config.model.scan: needs a whole number of repeats"),
        ({"remat": ("ful",)}, r"config.model.remat\[0\]: 'ful' is unknown; did you mean full?"),
        ({"remat": ()}, "config.model.remat: "),
        ({"loss_chunk": -1}, "config.model.loss_chunk: -1"),
    ],
)
def test_values_that_cannot_be(model, message):
    with pytest.raises(UserError, match=message):
        built(**model)


def test_muon_takes_each_scanned_layer_as_a_matrix():
    c = base.get_config()
    c.optimiser.name, c.optimiser.warmup_steps = "muon", 0
    tx, _ = make_optimiser(c)
    params = built()[1]
    gradients = jax.tree.map(jnp.sin, params)
    plain, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    stacked = stack(params, 1)
    scanned, _ = jax.jit(tx.update)(stack(gradients, 1), tx.init(stacked), stacked)
    close(plain, unstack(scanned), 1e-4, 1e-6)


# The loss in chunks


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_in_chunks_is_the_loss(tied):
    _, params, _, fn = built(tied=tied, layers=1)
    for chunk in (5, 8):
        close(fn(params), built(tied=tied, layers=1, loss_chunk=chunk)[3](params))


def largest(fn, *args):
    """Return the number of elements of the largest array in the compiled program."""
    text = fn.lower(*args).compile().as_text()
    shapes = re.findall(r"\b(?:f32|bf16|f16|s32|u32|pred)\[([\d,]+)\]", text)
    return max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)


@pytest.mark.parametrize("tied", [True, False])
def test_all_logits_never_exist(tied):
    _, params, _, fn = built(tied=tied, layers=1)
    assert largest(fn, params) >= BATCH * TIME * VOCABULARY
    _, _, _, fn = built(tied=tied, layers=1, loss_chunk=4)
    weights = max(x.size for x in jax.tree.leaves(params))
    assert largest(fn, params) == weights < BATCH * TIME * VOCABULARY


# All of it in a step, on a mesh


def test_a_step_with_everything_on_eight_devices_is_the_plain_one(folder):
    model = {"model.layers": 2, "model.scan": True, "model.remat": ("full",), "model.loss_chunk": 4}
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    common = {"data.tokeniser": "bpe", "data.vocabulary": 280, "model.layers": 2}
    outcomes = []
    (folder / "bpe").mkdir()
    for settings in (model | mesh | {"train.accumulate": 2}, {"model.layers": 2}):
        run = build_run(
            settled(tiny_config(folder), common | settings),
            folder / "bpe",
            None if "mesh.data" in settings else jax.devices()[:1],
        )
        tx, schedule = make_optimiser(run.config)
        with use(run.mesh, run.rules):
            abstract = abstract_state(run, tx)
            state = initial_state(run, tx, abstract)
            if outcomes:
                params = jax.device_put(unstack(outcomes[0][0]), jax.devices()[0])
                state = state.replace(params=params)
            start = jax.device_get(state.params)
            batch = put_batch(run, next(run.data.train_iterator(8, 0)))
            state, metrics = compile_train_step(run, tx, schedule, abstract).call(state, batch)
            outcomes.append((start, unstack(jax.device_get(state.params)), metrics))
    np.testing.assert_allclose(outcomes[0][2]["loss"], outcomes[1][2]["loss"], rtol=1e-5)
    close(outcomes[1][1], outcomes[0][1], 1e-4, 1e-5)
