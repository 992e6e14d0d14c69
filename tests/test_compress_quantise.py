"""Quantisation: rounded in training as it is when stored, by rules, and run from true integers."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compress_tools import DEVICES, LENGTH, batch, configured, initial, logits, made, task_loss, train
from qwix import QArray

from fastformer import compress
from fastformer.compress import store
from fastformer.compress.method import Calibration
from fastformer.compress.numerics import Format, dequantise, linear, quantise_weight
from fastformer.compress.sites import Site, sites
from fastformer.core.errors import UserError
from fastformer.core.trees import paths
from fastformer.decode.generate import decode_step
from fastformer.train import modes, setup

QKV = ("layer_0/mixer/key/weight", "layer_0/mixer/query/weight", "layer_0/mixer/value/weight")
MATRICES = {
    *QKV, "layer_0/mixer/out/weight", "layer_0/mlp/down/weight", "layer_0/mlp/gate/weight",
    "layer_0/mlp/up/weight",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantise")


def export(compression, model, params):
    return compression.export(model, params, Calibration(lambda: iter([batch()]), None))


def stored_paths(weights):
    pairs = jax.tree_util.tree_flatten_with_path(weights, is_leaf=lambda x: isinstance(x, QArray))[0]
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in pairs}
    return {path: x for path, x in leaves.items() if isinstance(x, QArray)}


@pytest.mark.parametrize(
    "settings, bits, tolerance",
    [
        ({}, 8, 0.03),
        ({"quantise__format": "int8_weights"}, 8, 0.03),
        ({"quantise__format": "int4"}, 4, 0.3),
        ({"quantise__format": "int4", "quantise__group": 8}, 4, 0.3),
        ({"quantise__format": "fp8"}, 8, 0.2),
        ({"quantise__rules": ("embedding=int8",), "model__tied": False}, 8, 0.03),
        ({"model__dtype": "bfloat16"}, 8, 0.06),
    ],
    ids=lambda x: str(x),
)
def test_stored_weights_do_as_training_did(folder, settings, bits, tolerance):
    compression, model, plain, params = made(configured(folder, "quantise", **settings))
    weights = export(compression, model, params)
    dtypes = {x.qvalue.dtype.itemsize * 8 if bits == 8 else 4 for x in stored_paths(weights).values()}
    assert dtypes == {bits} and MATRICES <= set(stored_paths(weights))
    trained, stored, exact = logits(model, params), logits(model, weights), logits(plain, params)
    spread = float(jnp.std(exact))
    # Not the largest: an input half-way between two integers may go either way.
    same = 0.02 if settings.get("model__dtype") else 1e-5
    assert float(jnp.median(jnp.abs(trained - stored))) < same * spread
    error = float(jnp.sqrt(jnp.mean((trained - exact) ** 2)))
    assert 1e-4 * spread < error < tolerance * spread


def test_biases_are_added_to_rounded_products(folder):
    _, model, plain, params = made(configured(folder, "quantise", model__bias=True))
    params = jax.tree_util.tree_map_with_path(lambda p, x: x + ("bias" in jax.tree_util.keystr(p)), params)
    want = logits(plain, params)
    assert float(jnp.sqrt(jnp.mean((logits(model, params) - want) ** 2))) < 0.03 * float(jnp.std(want))


def test_int4_is_stored_in_the_range_of_int4_with_scales_by_output_or_group(folder):
    found, heads = {}, {}
    for group in (0, 8):
        made_ = made(configured(folder, "quantise", quantise__format="int4", quantise__group=group))
        stored = stored_paths(export(*made_[:2], made_[3]))
        found[group], heads[group] = stored["layer_0/mlp/down/weight"], stored["layer_0/mixer/out/weight"]
        assert found[group].qvalue.dtype == jnp.int4
        values = np.asarray(found[group].qvalue).astype(np.int8)
        assert values.min() >= -8 and values.max() == 7
    assert found[0].scale.shape == (1, 16) and found[0].scale.dtype == jnp.float32
    assert found[8].scale.shape == (2, 16) and found[8].scale.dtype == jnp.bfloat16
    # Inputs that have heads share no scale with those of another head.
    assert heads[8].qvalue.shape == (2, 8, 16)
    assert heads[0].scale.shape == (1, 1, 16) and heads[8].scale.shape == (2, 1, 16)


@pytest.mark.parametrize("group", [4, 8])
def test_stored_groups_are_multiplied_as_what_they_stand_for(rng, group):
    site = Site("layer_0/mixer/out/weight", "BTHP,HPD->BTD", (3, 8, 16), False)
    sizes = np.exp(2 * rng.standard_normal((3, 1, 1)))  # heads of other sizes need other scales
    weight = jnp.asarray(sizes * rng.standard_normal((3, 8, 16)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((2, 5, 3, 8)), jnp.float32)
    form = Format("int4", group=group)
    stored = quantise_weight(weight, site, form)
    far = jnp.abs(dequantise(stored) - weight).reshape(3, 8 // group, group, 16).max(2)
    assert np.all(far <= 0.08 * jnp.abs(weight).reshape(3, 8 // group, group, 16).max(2))
    want = jnp.einsum(site.spec, x, dequantise(stored))
    np.testing.assert_allclose(linear(site, jnp.float32, x, stored, form, True), want, rtol=1e-5, atol=1e-4)


def test_what_is_kept_in_float_and_what_rules_change(folder):
    def chosen(**settings):
        compression, model, _, params = made(configured(folder, "quantise", **settings))
        return {path: x.qvalue.dtype for path, x in stored_paths(export(compression, model, params)).items()}

    assert set(chosen()) == MATRICES  # no embedding, norm or bias
    rules = ("embedding=int8_weights", ".*/(query|key)/weight=float", ".*/mlp/.*=int4", ".*/mlp/up/.*=int8")
    with pytest.raises(UserError, match=r"quantise.rules\[3\]: '.*/mlp/up/.*' matches no"):
        chosen(quantise__rules=rules)
    assert chosen(quantise__rules=rules[:3], quantise__format="fp8") == {
        "embedding": jnp.int8, "layer_0/mlp/down/weight": jnp.int4, "layer_0/mlp/gate/weight": jnp.int4,
        "layer_0/mlp/up/weight": jnp.int4, "layer_0/mixer/out/weight": jnp.float8_e4m3fn,
        "layer_0/mixer/value/weight": jnp.float8_e4m3fn,
    }  # fmt: skip


@pytest.mark.parametrize(
    "variant, kept",
    [
        ("gated_delta", ("swish_gate", "step", "strength")),
        ("hgrn2", ("key",)),
        ("rg_lru", ("input_gate", "recurrence_gate")),
    ],
)
def test_gates_and_decays_stay_float_unless_a_rule_names_them(folder, variant, kept):
    settings = {"model.attention.name": variant}
    config = configured(folder, "quantise", **{k.replace(".", "__"): v for k, v in settings.items()})
    compression, model, plain, _ = made(config)
    quantised = {site.path for site, _ in model.forms}
    assert "layer_0/mixer/value/weight" in quantised
    for name in kept:
        path = f"layer_0/mixer/{name}/weight"
        assert path in sites(plain) and path not in quantised
        config.compress.quantise.rules = (f"{path}=int8",)
        assert path in {site.path for site, _ in compress.build(config).model(plain).forms}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quantise__format": "int9"}, "quantise.format: 'int9' is unknown; did you mean int8?"),
        ({"quantise__rules": (".*mlp.*",)}, "quantise.rules[0]: '.*mlp.*' is not allowed; it must be REGEX="),
        ({"quantise__rules": (".*=int3",)}, "quantise.rules[0]: 'int3' is unknown"),
        ({"quantise__rules": ("(=int8",)}, "quantise.rules[0]: '(' is no regular expression"),
        ({"quantise__rules": ("layer_7/.*=int8",)}, "quantise.rules[0]: 'layer_7/.*' matches no matrix"),
        ({"quantise__rules": (".*norm.*=int8",)}, "quantise.rules[0]: '.*norm.*' matches no matrix"),
        ({"quantise__format": "int4", "quantise__group": 7}, "quantise.group: 7 does not divide the 16"),
        ({"quantise__format": "float"}, "quantise.format: 'float' and the rules leave every matrix float"),
        ({"quantise__start": -1}, "quantise.start: -1 is not allowed"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_are_told_before_anything_is_read(folder, tmp_path, settings, message):
    with pytest.raises(UserError, match=re.escape(f"config.compress.{message}")) as error:
        setup.build_run(configured(folder, "quantise", **settings), tmp_path, DEVICES)
    assert "\n" not in str(error.value)


def test_names_of_methods_and_keys(folder):
    config = configured(folder, "quantize")
    with pytest.raises(UserError, match="compress.methods: 'quantize' is unknown; did you mean quantise?"):
        compress.build(config)
    for names in (("quantise", "prune"), ("prune", "linearise"), ("linearise", "prune", "distil")):
        message = r"compress.methods: .*: name (prune|linearise|distil) before (quantise|prune|linearise)$"
        with pytest.raises(UserError, match=message):
            compress.build(configured(folder, *names))
    compress.build(configured(folder, "distil", "linearise", "prune", "quantise"))
    with pytest.raises(UserError, match="quantise is named 2 times"):
        compress.build(configured(folder, "quantise", "quantise"))
    with config.unlocked():
        config.compress.quantize = config.compress.quantise
    with pytest.raises(UserError, match="compress.quantize: no such key; did you mean quantise?"):
        compress.build(config)


def test_gradients_go_straight_through(folder):
    _, model, plain, params = made(configured(folder, "quantise", quantise__format="int4"))
    rounded, exact = (jax.grad(lambda p, m=m: task_loss(m, p))(params) for m in (model, plain))
    for path, gradient in paths(rounded).items():
        other = paths(exact)[path]
        cosine = float(jnp.vdot(gradient, other) / (jnp.linalg.norm(gradient) * jnp.linalg.norm(other)))
        assert cosine > 0.9, path


def test_rounding_begins_at_its_step(folder):
    _, model, plain, params = made(configured(folder, "quantise", quantise__start=3))
    at = [logits(compress.at(model, jnp.int32(step)), params) for step in (2, 3)]
    np.testing.assert_array_equal(at[0], logits(plain, params))
    np.testing.assert_array_equal(at[1], logits(model, params))
    assert float(jnp.max(jnp.abs(at[1] - at[0]))) > 0


def test_integers_are_multiplied_with_integers_and_a_token_scales_alone(folder):
    compression, model, _, params = made(configured(folder, "quantise"))
    weights = export(compression, model, params)
    text = jax.jit(lambda w: logits(model, w)).lower(weights).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line and "xi8>" in line]
    assert len(products) == len(MATRICES) and all("xi32>" in line for line in products)
    together, alone = logits(model, weights, rows=4), logits(model, weights, rows=1)
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)  # no scale is shared with other rows


@pytest.mark.parametrize("form, kept", [("int8", "s8"), ("int4", "s4")])
def test_a_decode_loop_carries_integers(folder, form, kept):
    rules = {"quantise__format": form, "quantise__rules": (f"embedding={form}",)}
    compression, model, _, params = made(configured(folder, "quantise", **rules))
    weights = export(compression, model, params)

    def decode(weights):
        one = jnp.ones((1,), jnp.int32)

        def step(carry, _):
            token, state = carry
            scores, state = decode_step(model, weights, token, one, one > 0, state)
            return (jnp.argmax(scores, -1).astype(jnp.int32), state), token

        return jax.lax.scan(step, (one, model.init_state(1, LENGTH)), None, LENGTH)[1]

    compiled = jax.jit(decode).lower(weights).compile().as_text()
    loop = next(line for line in compiled.splitlines() if " while(" in line)
    # XLA takes what does not change out of loops; the float forms of matrices must not be among it.
    assert loop.count(f"{kept}[") == len(MATRICES) + 1
    assert "f32[257,16]" not in loop and "f32[16,2,8]" not in loop and "f32[16,16]" not in loop


def test_nothing_changes_outside(folder):
    _, model, plain, params = made(configured(folder, "quantise"))
    before = logits(plain, params)
    logits(model, params)
    np.testing.assert_array_equal(logits(plain, params), before)
    assert hash(model) == hash(made(configured(folder, "quantise"))[1])
    assert paths(initial(model)).keys() == paths(params).keys()


def test_a_run_is_stored_evaluated_and_generates_from_integers(folder, tmp_path, capsys):
    rules = ("embedding=int4", ".*/mlp/.*=int4")
    config = configured(folder, "quantise", quantise__rules=rules, quantise__group=8, quantise__start=6)
    train(config, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    path = tmp_path / "weights.safetensors"
    assert path.stat().st_size == result["bytes_on_disk"]
    arrays = store.load(path)
    assert arrays["embedding/qvalue"].dtype == ml_dtypes.int4
    assert arrays["layer_0/mixer/query/weight/qvalue"].dtype == np.int8
    assert arrays["layer_0/mixer_norm/scale"].dtype == np.float32
    capsys.readouterr()
    modes.evaluate(config, tmp_path, ())
    out, err = capsys.readouterr()
    assert "as stored in" in err
    found = json.loads(out)
    # Two programs: an input that lies between two integers may become either.
    assert {name: found[name] for name in result["quality"]} == pytest.approx(result["quality"], rel=1e-4)
    modes.generate(config, tmp_path, {"prompt": ["the "]})
    assert result["samples"][0] in capsys.readouterr().out
    arrays["layer_0/mixer/query/weight/scale"] *= 0  # the file is what is run, not the checkpoint
    path.write_bytes(store.dump(arrays))
    modes.evaluate(config, tmp_path, ())
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] != pytest.approx(found["bits_per_byte"])
