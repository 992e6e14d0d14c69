"""Optimisers against optax's own, schedules, groups of parameters, the average of the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from tiny import configured

from fastformer.core import config as configuration
from fastformer.core.errors import UserError
from fastformer.core.mesh import use
from fastformer.core.trees import nbytes, paths
from fastformer.train import loop
from fastformer.train.checkpoint import restore_params
from fastformer.train.groups import decayed
from fastformer.train.optimiser import hidden_matrices, make_optimiser
from fastformer.train.setup import build_run
from fastformer.train.state import abstract_state, initial_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


def weights():
    """Return a tree with one of each kind: a hidden matrix, one large enough to be factored, a vector."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"up": (8, 4), "down": (128, 130)}
    block = {name: {"weight": jax.random.normal(keys[0], shape)} for name, shape in shapes.items()}
    block["norm"] = {"scale": jax.random.normal(keys[1], (8,))}
    return {"layer_0": block, "embedding": jax.random.normal(keys[2], (5, 8))}


def after(tx, steps=3):
    """Return the weights after some updates, whose gradients depend on the step."""
    params = weights()
    state = tx.init(params)
    for step in range(steps):
        gradients = jax.tree.map(lambda x, step=step: jnp.sin(x * (step + 1)) + 0.1, params)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def own(name, rate):
    """Return optax's own optimiser of that name, as ours is set here."""
    b1, b2, decay = 0.8, 0.9, 0.3
    if name == "adamw":
        return optax.adamw(rate, b1, b2, weight_decay=decay, mask=decayed)
    if name == "lion":
        return optax.lion(rate, b1, b2, weight_decay=decay, mask=decayed)
    if name == "adafactor":  # its own decay does not follow the rate; ours does, as with all others
        return optax.chain(optax.adafactor(rate, momentum=b1), optax.identity())
    return optax.contrib.muon(
        rate,
        weight_decay=decay,
        muon_weight_dimension_numbers=hidden_matrices,
        consistent_rms=0.2,
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_ours_is_optaxs(folder, name):
    settings = {"b1": 0.8, "b2": 0.9, "clip": 0.0, "warmup_steps": 0, "schedule": "constant"}
    settings["weight_decay"] = 0.0 if name == "adafactor" else 0.3
    settings = {f"optimiser__{key}": value for key, value in settings.items()}
    tx, _ = make_optimiser(configured(folder, optimiser__name=name, optimiser__learning_rate=0.1, **settings))
    expected = paths(after(own(name, 0.1)))
    if name == "muon":  # the rest is plain AdamW's, where optax has Nesterov's momentum and no decay
        rest = paths(after(own("adamw", 0.1)))
        expected |= {path: x for path, x in rest.items() if not path.endswith("weight")}
    for path, x in paths(after(tx)).items():
        np.testing.assert_allclose(x, expected[path], rtol=2e-5, atol=1e-6, err_msg=path)


def test_adafactor_is_smaller_and_its_second_moment_rises_to_b2(folder):
    config = configured(folder, optimiser__name="adafactor", optimiser__b1=0.0)
    size = nbytes(make_optimiser(config)[0].init(weights()))
    adamw = nbytes(make_optimiser(configured(folder))[0].init(weights()))
    assert size < 0.03 * adamw
    settings = {"warmup_steps": 0, "clip": 0.0, "schedule": "constant"}
    settings = {f"optimiser__{key}": value for key, value in settings.items()}
    one, other = (
        configured(folder, optimiser__name="adafactor", optimiser__b2=b2, **settings) for b2 in (0.3, 0.9)
    )
    assert not np.allclose(*(after(make_optimiser(c)[0])["embedding"] for c in (one, other)), rtol=1e-4)


def test_schedules(folder):
    def rates(name, **more):
        more |= {"schedule": name, "learning_rate": 1.0, "warmup_steps": 2}
        settings = {f"optimiser__{key}": value for key, value in more.items()}
        schedule = make_optimiser(configured(folder, train__steps=12, **settings))[1]
        return [float(schedule(made)) for made in range(12)]

    np.testing.assert_allclose(rates("linear")[:3], [0.5, 1.0, 0.91], rtol=1e-6)
    np.testing.assert_allclose(rates("linear")[11], 0.1, rtol=1e-6)
    np.testing.assert_allclose(rates("constant"), [0.5] + [1.0] * 11)
    wsd = rates("wsd", decay_steps=4, final_fraction=0.0)
    np.testing.assert_allclose(wsd, [0.5] + [1.0] * 7 + [0.75, 0.5, 0.25, 0.0], atol=1e-6)
    assert rates("wsd")[9] == 1.0 > rates("wsd")[10]  # a fifth of the ten steps after the warm-up


def test_groups(folder):
    groups = (("layer_0/down", 0.0, None), ("layer_0/", 0.5, 0.0), ("scale|embedding", 1.0, 2.0))
    settings = {"warmup_steps": 0, "clip": 0.0, "schedule": "constant", "learning_rate": 0.1}
    settings = {f"optimiser__{key}": value for key, value in settings.items()}
    grouped = after(make_optimiser(configured(folder, optimiser__groups=groups, **settings))[0], 1)
    plain = after(make_optimiser(configured(folder, optimiser__weight_decay=0.0, **settings))[0], 1)
    before = weights()
    np.testing.assert_array_equal(grouped["layer_0"]["down"]["weight"], before["layer_0"]["down"]["weight"])
    for name, kind in (("up", "weight"), ("norm", "scale")):  # the first rule that matches
        start = before["layer_0"][name][kind]
        moved = [np.asarray(x["layer_0"][name][kind] - start) for x in (grouped, plain)]
        np.testing.assert_allclose(moved[0], moved[1] / 2, rtol=1e-4, atol=1e-6)
    expected = plain["embedding"] - 0.1 * 2.0 * before["embedding"]
    np.testing.assert_allclose(grouped["embedding"], expected, rtol=1e-4, atol=1e-6)


def test_no_groups_and_a_group_that_says_nothing_are_the_same(folder):
    all_groups = (), ((".", 1.0, None),)
    one, other = (make_optimiser(configured(folder, optimiser__groups=groups))[0] for groups in all_groups)
    for a, b in zip(jax.tree.leaves(after(one)), jax.tree.leaves(after(other)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((("layer_1/", 0.1, None),), r"config.optimiser.groups\[0\]: 'layer_1/': it matches no parameter"),
        (((".", 1.0, None), ("up", 0.1, None)), r"groups\[1\]: 'up': earlier rules have all that it matches"),
        ((("(", 0.1, None),), r"config.optimiser.groups\[0\]: .*no regular expression"),
        ((("up", -1.0, None),), r"groups\[0\]: rate: -1.0 is not allowed"),
        ((("up", 1.0),), r"groups\[0\]: .* is not \(pattern, rate, decay or None\)"),
    ],
)
def test_groups_that_cannot_be(folder, groups, message):
    with pytest.raises(UserError, match=message) as error:
        make_optimiser(configured(folder, optimiser__groups=groups))[0].init(weights())
    assert "\n" not in str(error.value)


def test_groups_from_the_command_line_and_from_json(folder):
    text = "(('layer_0/', 0.1, None),)"
    config = configured(folder, optimiser__groups=text)
    assert config.optimiser.groups == (("layer_0/", 0.1, None),)
    again = configuration.from_json(configuration.to_json(config))
    assert not configuration.differences(config, again)
    make_optimiser(again)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, "config.optimiser.schedule: 'cosin' is unknown; did you mean cosine?"),
        ({"decay_steps": 9}, "config.optimiser.decay_steps: 9 .* config.train.steps less the warm-up, 8"),
        ({"average": 1.0}, "config.optimiser.average: 1.0"),
    ],
)
def test_values_that_cannot_be(folder, settings, message):
    with pytest.raises(UserError, match=message):
        make_optimiser(configured(folder, **{f"optimiser__{k}": v for k, v in settings.items()}))


def test_factored_moments_lie_whole_and_the_rest_in_shards(tmp_path):
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "sharding__V": ()}
    config = configured(tmp_path, optimiser__name="adafactor", model__width=128, model__ff_width=128, **mesh)
    run = build_run(config, tmp_path)
    tx, _ = make_optimiser(config)
    with use(run.mesh, run.rules):
        abstract = abstract_state(run, tx)
        state = initial_state(run, tx, abstract)
    found = paths(state.opt_state)
    row = next(x for path, x in found.items() if path.endswith("v_row/layer_0/mlp/up/weight"))
    assert row.shape == (128,) and row.addressable_shards[0].data.shape == (128,)
    momentum = next(x for path, x in found.items() if path.endswith("ema/layer_0/mlp/up/weight"))
    assert momentum.shape == (128, 128) and momentum.addressable_shards[0].data.shape == (64, 64)


def test_the_average_is_what_is_evaluated_kept_and_deployed(tmp_path, monkeypatch):
    """It follows the weights by its recursion, over an interruption too."""
    seen = {}
    save = loop.Checkpoints.save

    def watching(checkpoints, state, *rest):
        seen[int(state.step)] = jax.device_get((state.params["embedding"], state.average["embedding"]))
        save(checkpoints, state, *rest)

    monkeypatch.setattr(loop.Checkpoints, "save", watching)
    config = configured(tmp_path, optimiser__average=0.5, checkpoint__every=1, checkpoint__keep=20)
    loop.train(config, tmp_path / "run", jax.devices()[:1])
    for step in range(2, 13):
        decay = min(0.5, step / (9 + step))  # as many updates were made before as step - 1
        expected = decay * seen[step - 1][1] + (1 - decay) * seen[step][0]
        np.testing.assert_allclose(seen[step][1], expected, rtol=1e-5, atol=1e-7)
    deployed = load_file(tmp_path / "run/weights.safetensors")["embedding"]
    np.testing.assert_array_equal(deployed, seen[12][1])
    assert np.abs(deployed - seen[12][0]).max() > 1e-5
    run = build_run(config, tmp_path / "run", jax.devices()[:1])
    best = loop.Checkpoints(tmp_path / "run", 20, read_only=True)._best_first()[0]
    np.testing.assert_array_equal(restore_params(run)["embedding"], seen[best][1])
