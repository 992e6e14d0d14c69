"""What looks at text before it rounds or prunes: against brute force, the easy way, and their papers' aim."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_tools import LENGTH, batch, configured, made, train

from fastformer import compress, tasks
from fastformer.compress import awq, store
from fastformer.compress.calibrate import Text, blocks, inputs_of, letters_of, unblocks
from fastformer.compress.method import Calibration
from fastformer.compress.numerics import dequantise, is_stored, replace_leaves
from fastformer.compress.quantised import forms_of, without_rounding
from fastformer.compress.second_order import gptq, inverse_factor, sparsegpt
from fastformer.compress.sites import Site, sites
from fastformer.compress.sparsify import by_sparsegpt, by_wanda
from fastformer.core.errors import UserError
from fastformer.core.seq import whole
from fastformer.core.trees import paths

CALIBRATION = Calibration(lambda: (batch(seed=seed) for seed in range(8)), tasks.Text().loss)
SITE = Site("layer_0/x/weight", "BTD,DF->BTF", (12, 5), False)


def correlated(rng, tokens=200, inputs=12):
    """Return inputs of which some follow others, as those of a model do."""
    mix = rng.normal(size=(inputs, inputs)) * np.geomspace(3, 0.1, inputs)[:, None]
    return (rng.normal(size=(tokens, inputs)) @ mix).astype(np.float32)


def test_the_factor_is_of_the_inverse(rng):
    gram = correlated(rng).T @ correlated(rng)
    gram = gram @ gram.T / 100
    U = np.asarray(inverse_factor(jnp.asarray(gram)), np.float64)
    damped = gram + 0.01 * np.mean(np.diagonal(gram)) * np.eye(12)
    np.testing.assert_allclose(np.tril(U, -1), 0)
    np.testing.assert_allclose(U.T @ U @ damped, np.eye(12), atol=2e-2)


def brain_surgeon(weight, gram, numbers_of, gone_of=None):
    """Return the weights after each input was changed in turn, by eq. 2 and 3 of 2210.17323 as they stand."""
    weight = weight.astype(np.float64).copy()
    damped = gram + 0.01 * np.mean(np.diagonal(gram)) * np.eye(len(gram))
    for i in range(len(weight)):
        inverse = np.linalg.inv(damped[i:, i:])
        new = numbers_of(i, weight, inverse)
        weight[i:] -= np.outer(inverse[:, 0] / inverse[0, 0], weight[i] - new)
        weight[i] = new
    return weight


def test_gptq_is_the_brain_surgeon_in_falling_order(rng):
    x, weight = correlated(rng), rng.normal(size=(12, 5)).astype(np.float32)
    gram = x.T @ x
    scale = np.broadcast_to(np.abs(weight).max(0) / 7.5, weight.shape).astype(np.float32)
    grid = lambda y: jnp.clip(jnp.round(y), -8, 7)  # noqa: E731
    found = np.asarray(gptq(*map(jnp.asarray, (weight, scale, gram)), grid)) * scale
    order = np.argsort(-np.diagonal(gram))
    wanted = np.empty_like(weight)
    wanted[order] = brain_surgeon(
        weight[order],
        gram[order][:, order],
        lambda i, w, _: np.clip(np.round(w[i] / scale[0]), -8, 7) * scale[0],
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    nearest = np.clip(np.round(weight / scale), -8, 7) * scale
    apart = [np.linalg.norm(x @ (y - weight)) for y in (found, nearest)]
    assert apart[0] < 0.8 * apart[1]


def test_gptq_leaves_zeros_alone(rng):
    x, weight = correlated(rng), rng.normal(size=(12, 5)).astype(np.float32)
    weight[::2] = 0
    grid = jnp.round
    found = gptq(jnp.asarray(weight), jnp.full((12, 5), 0.1), jnp.asarray(x.T @ x), grid)
    assert np.all(np.asarray(found)[::2] == 0) and np.any(np.asarray(found)[1::2])


@pytest.mark.parametrize("kept_of", [(0, 0), (2, 4)])
def test_sparsegpt_is_the_brain_surgeon(rng, kept_of):
    x, weight = correlated(rng), rng.normal(size=(12, 5)).astype(np.float32)
    gram, gone = x.T @ x, np.zeros((12, 5), bool)
    size = kept_of[1] or 12

    def numbers(i, w, inverse):
        if i % size == 0:
            # What stands on the diagonal of the inverse when input j is reached, known beforehand.
            rest = gram[i:, i:] + 0.01 * np.mean(np.diagonal(gram)) * np.eye(12 - i)
            diagonal = np.array([np.linalg.inv(rest[j:, j:])[0, 0] for j in range(size)])
            scores = w[i : i + size] ** 2 / diagonal[:, None]
            if kept_of[1]:
                gone[i : i + size] = np.argsort(np.argsort(scores, 0), 0) < 2
            else:
                gone[i : i + size] = scores <= np.sort(scores.ravel())[scores.size // 2 - 1]
        return np.where(gone[i], 0, w[i])

    wanted = brain_surgeon(weight, gram, numbers)
    found = np.asarray(sparsegpt(jnp.asarray(weight), jnp.asarray(gram), 0.5, kept_of))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert (found == 0).mean() == 0.5


@pytest.mark.parametrize("prune", [by_wanda, by_sparsegpt])
def test_looking_at_text_beats_magnitude(rng, prune):
    """Inputs of a model are of unlike sizes (2306.11695), and so the size of a weight alone says little."""
    x, weight = correlated(rng) * np.geomspace(0.1, 10, 12), rng.normal(size=(12, 5)).astype(np.float32)
    inputs = inputs_of(SITE, jnp.asarray(x, jnp.float32)[None])
    found = np.asarray(prune(SITE, jnp.asarray(weight), inputs, 0.5, (0, 0)))
    least = np.sort(np.abs(weight).ravel())[30]
    magnitude = np.where(np.abs(weight) >= least, weight, 0)
    apart = [np.linalg.norm(x @ (y - weight)) for y in (found, magnitude)]
    assert (found == 0).mean() == 0.5 and apart[0] < 0.5 * apart[1]


def test_wanda_by_hand():
    weight = jnp.asarray([[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]])
    site = Site("x/weight", "BTD,DF->BTF", (4, 2), False)
    inputs = inputs_of(site, jnp.asarray([[[8.0, 1, 1, 1], [0, 0, 0, 0]]]))
    found = by_wanda(site, weight, inputs, 0.5, (0, 0))
    np.testing.assert_array_equal(found, [[1, 4], [0, 3], [0, 0], [4, 0]])
    found = by_wanda(site, weight, inputs, 0.1, (1, 2))
    np.testing.assert_array_equal(found, [[1, 4], [0, 0], [0, 2], [4, 0]])


@pytest.mark.parametrize("spec, shape", [("BTD,DHK->BTHK", (3, 2, 4)), ("BTHP,HPD->BTD", (2, 4, 3)),
                                         ("BTHK,HKR->BTHR", (2, 3, 4)), ("BTD,VD->BTV", (5, 3))])  # fmt: skip
def test_blocks_are_what_the_product_sums_over(rng, spec, shape):
    site = Site("x/weight", spec, shape, False)
    weight = rng.normal(size=shape).astype(np.float32)
    shared, summed, _ = letters_of(site)
    sizes = dict(zip(site.letters, shape)) | {"B": 2, "T": 3}
    x = rng.normal(size=[sizes[letter] for letter in spec.split(",")[0]]).astype(np.float32)
    seen = inputs_of(site, jnp.asarray(x))
    matrices = blocks(site, jnp.asarray(weight))
    np.testing.assert_array_equal(unblocks(site, matrices), weight)
    y = np.einsum(spec, x, weight)
    found = jnp.einsum("SIO,SIJ,SJO->", matrices, seen.gram, matrices)
    np.testing.assert_allclose(found, (y**2).sum(), rtol=1e-5)
    assert seen.count == 6


def logits(model, params):
    """Return logits of text that was not looked at."""
    return model.apply({"params": params}, batch(seed=10**6)["tokens_BT"], whole(4, LENGTH))[0]


def with_outliers(params):
    """Return the weights with norms that make some channels large, as those of trained models are."""

    def one(path, leaf):
        return leaf.at[::5].mul(20.0) if path.endswith("_norm/scale") and "layer" in path else leaf

    return replace_leaves(params, one)


def rounded(folder, rounding, **settings):
    """Return ``(model, float model, weights, stored weights)`` of int4 in groups."""
    mine = {"quantise__format": "int4", "quantise__group": 8, "quantise__rounding": rounding}
    compression, model, plain, params = made(configured(folder, "quantise", **mine | settings))
    params = with_outliers(params)
    return model, plain, params, compression.export(model, params, CALIBRATION)


@pytest.mark.parametrize("name", ["softmax", "gated_delta"])
def test_gptq_errs_less_on_the_text_in_every_matrix(tmp_path, name):
    found = {how: rounded(tmp_path, how, model__attention__name=name) for how in ("nearest", "gptq")}
    model, plain, params, _ = found["gptq"]
    maps = {path: site for path, (site, _) in forms_of(model).items() if not site.table}
    # Of one block all matrices are rounded by what they are given in float.
    seen = Text(CALIBRATION).inputs(plain, params, maps)
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), stored) for *_, stored in found.values()]
    assert kinds[0] == kinds[1]

    def error(stored, path):
        apart = blocks(maps[path], dequantise(leaves(stored)[path]) - paths(params)[path])
        return float(jnp.einsum("SIO,SIJ,SJO->", apart, seen[path].gram, apart))

    for path in maps:
        assert error(found["gptq"][3], path) < 0.97 * error(found["nearest"][3], path), path


def leaves(stored):
    """Return the leaves by path, what is stored in integers as one leaf."""
    flat = {}
    replace_leaves(stored, flat.setdefault)
    return flat


@pytest.mark.parametrize("group, of_nearest", [(0, 0.9), (8, 1.0)])
def test_awq_errs_less_where_some_channels_are_large(tmp_path, group, of_nearest):
    far = {}
    for how in ("nearest", "awq"):
        model, plain, params, stored = rounded(tmp_path, how, quantise__group=group)
        far[how] = float(jnp.linalg.norm(logits(model, stored) - logits(plain, params)))
    assert far["awq"] < of_nearest * far["nearest"], far


@pytest.mark.parametrize("settings", [{}, {"mlp": "gelu", "norm": "layer"}, {"kv_heads": 1}])
def test_awq_moves_scales_without_changing_what_is_computed(tmp_path, settings):
    config = configured(tmp_path, "quantise", **{f"model__{key}": value for key, value in settings.items()})
    _, model, plain, params = made(config)
    params = with_outliers(params)
    moved = awq.scale(without_rounding(model), params, forms_of(model), Text(CALIBRATION))
    np.testing.assert_allclose(logits(plain, moved), logits(plain, params), rtol=1e-3, atol=1e-3)
    before, after = paths(params), paths(moved)
    changed = {path for path in before if np.any(np.asarray(before[path] != after[path]))}
    assert "layer_0/mlp_norm/scale" in changed
    assert ("layer_0/mlp/down/weight" in changed) <= (settings.get("mlp") != "gelu")
    assert ("layer_0/mixer/out/weight" in changed) <= ("kv_heads" not in settings)


@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_a_run_prunes_by_text_and_rounds_what_is_left(tmp_path, score):
    settings = {
        "prune__score": score,
        "prune__pattern": "2:4",
        "quantise__rounding": "gptq",
        "train__steps": 2,
    }
    config = configured(
        tmp_path, "prune", "quantise", **settings, optimiser__warmup_steps=1, evaluate__every=0
    )
    train(config, tmp_path / "run")
    stored = store.tree(store.load(tmp_path / "run" / "weights.safetensors"))
    dense = [path for path, leaf in paths(replace_leaves(stored, _share)).items() if 0.4 < leaf < 0.6]
    assert {path.split("/")[-2] for path in dense} == {"query", "key", "value", "out", "up", "gate", "down"}


def _share(path, leaf):
    whole_leaf = dequantise(leaf) if is_stored(leaf) else leaf
    return (np.asarray(whole_leaf) != 0).mean()


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"quantise__rounding": "gtpq"},
            "quantise.rounding: 'gtpq' is unknown; did you mean gptq",
        ),
        ({"compress__batches": 0}, "config.compress.batches: 0 is not allowed"),
        ({"prune__score": "wandas"}, "prune.score: 'wandas' is unknown; did you mean wanda"),
        ({"prune__score": "wanda", "prune__start": 3}, "prune.start: 3 is not allowed"),
    ],
)
def test_mistakes(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        compress.build(configured(tmp_path, "prune", "quantise", **settings))


@pytest.mark.parametrize(
    "method, settings", [("quantise", {"quantise__rounding": "gptq"}), ("prune", {"prune__score": "wanda"})]
)
def test_scanned_layers_are_refused_before_training(tmp_path, method, settings):
    with pytest.raises(UserError, match="config.model.scan: what is calibrated"):
        made(configured(tmp_path, method, model__scan=True, **settings))


def test_padding_is_not_looked_at(rng):
    x = rng.normal(size=(2, 3, 12)).astype(np.float32)
    real = jnp.asarray([[True, True, False], [True, False, False]])
    found, wanted = inputs_of(SITE, jnp.asarray(x), real), inputs_of(SITE, jnp.asarray(x[real])[None])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"bias": True}])
def test_awq_finds_as_many_scales_in_few_bits_and_with_biases(tmp_path, settings):
    """In bfloat16 rounding noise would hide that a move changes nothing; a bias of values moves along."""
    found = []
    for more in ({}, settings):
        config = configured(tmp_path, "quantise", **{f"model__{key}": value for key, value in more.items()})
        _, model, _, params = made(config)
        params = with_outliers(jax.tree.map(lambda x: x + 0.1, params))
        known, text = sites(without_rounding(model)), Text(CALIBRATION)
        exact = awq._exact(without_rounding(model), params, text)
        found.append({feed.source[0] for feed in awq.feeds(params, known) if exact(feed)})
    assert found[0] == found[1] and "layer_0/mixer/value/weight" in found[0]
