"""Prefix LM: a source sees all of itself, a target what stands before it, in training as in decoding."""

from __future__ import annotations

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_translate
from jax import export
from safetensors.numpy import load_file
from tiny import configured

from configs import base
from fastformer import interop, models, tasks
from fastformer.attention import VARIANTS, make
from fastformer.core.errors import UserError
from fastformer.core.mesh import MeshConfig, make_mesh, rules, use
from fastformer.core.seq import Seq
from fastformer.data.pair_rows import joined_row
from fastformer.data.tokenisers import ByteTokeniser
from fastformer.decode.steps import decode_step, prefill
from fastformer.decode.stored import stored
from fastformer.train import loop, modes
from fastformer.train.setup import build_run

ABLE = [name for name, row in VARIANTS.items() if row.prefix_lm]
WIDTH, LENGTH, END = 16, 24, 4
# A row is (prefix, tokens) of each segment; () is a gap of three tokens of padding.
SMALL = [[(3, 6), (4, 4), (), (1, 5)], [(0, 7), (), (8, 11)]]
LARGE = [[(90, 140), (), (100, 101)], [(1, 9), (150, 200), ()]]  # prefixes that reach over blocks of 128


def rows(parts, time):
    """Return the Seq of rows of segments, padded to ``time``."""
    found = np.zeros((3, len(parts), time), np.int32)
    for row, segments in enumerate(parts):
        at = 0
        for number, sizes in enumerate(segments, 1):
            prefix, size = sizes or (0, 3)
            place = np.arange(size)
            if sizes:
                found[:, row, at : at + size] = np.full(size, number), place, np.maximum(place, prefix - 1)
            at += size
    return Seq(*found)


def layer(name, **shared):
    fields = {"heads": 4, "kv_heads": 2, "head_width": 8, "positions": "rope", "length": 300}
    sinks = {"learned_sinks": True} if shared.pop("sinks", False) else {}
    mixer = make(name, VARIANTS[name].small | sinks, fields | shared)
    seq = rows([[(1, 2)]], 2)
    variables = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 2, WIDTH)), seq))
    return mixer, jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), variables)


def inputs(seq, nan=False):
    x = jax.random.normal(jax.random.key(1), (*seq.segment_BT.shape, WIDTH))
    return jnp.where((seq.segment_BT > 0)[..., None], x, jnp.nan if nan else 0.0)


def value_and_gradients(mixer, variables, x, seq):
    def loss(variables, x, seq):
        y = mixer.apply(variables, x, seq)[0]
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)), y

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables, x, seq)


def near(got, want, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()), rtol=0)


@pytest.mark.parametrize("form", ["auto", "reference"])
@pytest.mark.parametrize("name", ABLE)
def test_who_sees_whom(name, form):
    """The derivative of each output by each input, against the rule written out."""
    mixer, variables = layer(name, implementation=form)
    for parts in SMALL:
        seq = rows([parts], 21)
        x = inputs(seq)
        slopes = jax.jit(jax.jacobian(lambda x, seq=seq: mixer.apply(variables, x, seq)[0][0]))(x)
        got = np.abs(slopes[:, :, 0]).max(axis=(1, 3)) > 0
        want, at = np.zeros((21, 21), bool), 0
        for prefix, size in (sizes or (0, 3) for sizes in parts):
            for query in range(size if (prefix, size) in parts else 0):
                for key in range(size):
                    want[at + query, at + key] = key <= query or (query < prefix and key < prefix)
            at += size
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "parts, shared",
    [
        (SMALL, {}),
        (LARGE, {}),
        (LARGE, {"positions": "alibi", "soft_cap": 2.0}),
        (SMALL, {"sinks": True}),
        (SMALL, {"short_conv": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ABLE)
def test_forward_is_reference(name, parts, shared):
    mixer, variables = layer(name, **shared)
    seq = rows(parts, 257 if parts is LARGE else 21)
    x = inputs(seq, nan=True)
    fast, slow = (
        value_and_gradients(mixer.clone(implementation=form), variables, x, seq)
        for form in ("auto", "reference")
    )
    near(fast, slow)
    plain = mixer.apply(variables, x, seq._replace(last_BT=None))[0]
    assert np.abs(plain - fast[1]).max() > 1e-3


@pytest.mark.parametrize("name", ABLE)
def test_a_prefix_at_once_and_then_token_by_token(name):
    mixer, variables = layer(name)
    seq = rows([[(7, 21)], [(3, 21)]], 21)
    x, step, state = inputs(seq), jax.jit(mixer.apply), mixer.init_state(2, 30)
    parts = []
    for start, end in ((0, 9), (9, 10), (10, 14), *((at, at + 1) for at in range(14, 21))):
        piece = jax.tree.map(lambda a, start=start, end=end: a[:, start:end], seq)
        piece = piece if start == 0 else piece._replace(last_BT=None)
        y, state = step(variables, x[:, start:end], piece, state)
        parts.append(y)
    near(np.concatenate(parts, axis=1), mixer.apply(variables, x, seq)[0])


@pytest.mark.parametrize("name", ABLE)
def test_rows_split_in_time_are_the_same(name):
    """A prefix that reaches over shards is seen by those before its end."""
    mixer, variables = layer(name)
    seq = rows([[(9, 12), (), (17, 25)], [(38, 40)]], 40)
    x = inputs(seq)
    want = value_and_gradients(mixer, variables, x, seq)
    letters = {"B": ("data",), "H": ("tensor",), "G": ("tensor",), "T": ("sequence",), "S": ("sequence",)}
    with use(make_mesh(MeshConfig(data=1, fsdp=1, tensor=2, sequence=4)), rules(letters)):
        near(value_and_gradients(mixer, variables, x, seq), want)


@functools.cache
def decoder(prefix_lm, **settings):
    c = base.get_config()
    c.model.layers, c.model.width, c.model.heads, c.model.prefix_lm = 2, WIDTH, 2, prefix_lm
    for key, value in settings.items():
        c.model[key] = value
    model = models.build(c, END + 1, LENGTH)
    params = model.init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32), rows([[(0, 4)]], 4))["params"]
    return model, jax.tree.map(lambda a: 4.0 * a if a.ndim > 1 else a, nn.unbox(params))


@functools.cache
def compiled(model):
    return jax.jit(lambda params, tokens, seq: model.apply({"params": params}, tokens, seq)[0])


def logits(model, params, tokens, seq):
    return np.asarray(compiled(model)(params, np.asarray(tokens)[None], seq)[0])


@pytest.mark.parametrize("prefix_lm", [False, True])
def test_what_a_token_changes(prefix_lm):
    """A later token of the source changes earlier ones of the source, in this form alone; a target none."""
    model, params = decoder(prefix_lm)
    tokens, seq = np.asarray([4, 1, 2, 0, 4, 3, 3, 1, 2]), rows([[(5, 9)]], 9)
    before = logits(model, params, tokens, seq)
    for place in range(1, 9):
        after = logits(model, params, np.where(np.arange(9) == place, (tokens + 1) % 4, tokens), seq)
        changed = np.abs(after - before).max(axis=1) > 1e-6
        first = 0 if prefix_lm and place < 5 else place
        assert not changed[:first].any() and changed[first:].all()


@pytest.mark.parametrize(
    "settings", [{}, {"scan": True, "remat": ("full",)}, {"implementation": "reference"}]
)
def test_packed_pairs_are_pairs_alone(settings):
    model, params = decoder(True, **settings)
    pairs = [([4, 1, 2, 4], [4, 3, 2, 4]), ([4, 0, 4], [4, 1, 4]), ([4, 3, 3, 1, 0, 4], [4, 2, 4])]
    row, *alone = (joined_row(some, 21) for some in (pairs, *([pair] for pair in pairs)))

    def outputs(row):
        seq = Seq(*(row[f"{name}_T"][None] for name in ("segment", "position", "last")))
        return logits(model, params, row["tokens_T"], seq)

    together, start = outputs(row), 0
    for (source, target), one in zip(pairs, alone):
        size = len(source) + len(target) - 2
        assert one["last_T"][:size].tolist() == [len(source) - 1] * len(source) + [*range(len(source), size)]
        near(together[start : start + size], outputs(one)[:size])
        start += size


@pytest.mark.parametrize("state, tolerance", [("float", 1e-4), ("int8", 0.1)])
def test_decoding_is_the_whole_row(state, tolerance):
    """The logits of a prompt read at once and of any target after it, token by token."""
    model, params = decoder(True)
    sizes, tokens = np.asarray([3, 6, 4]), np.asarray(jax.random.randint(jax.random.key(2), (3, 16), 0, END))
    want = np.stack([logits(model, params, row, rows([[(n, 16)]], 16)) for row, n in zip(tokens, sizes)])
    causal = np.stack([logits(model, params, row, rows([[(0, 16)]], 16)) for row in tokens])
    row = np.arange(3)
    assert np.abs(causal - want)[row, sizes - 1].max(axis=1).min() > 2 * tolerance
    model = stored(model, state)
    got, after, place = jax.jit(lambda *args: prefill(model, *args, 24, END))(params, tokens[:, :8], sizes)
    step = jax.jit(lambda token, place, after: decode_step(model, params, token, place, place < 16, after))
    for _ in range(5):
        near(got, want[row, place - 1], tolerance)
        got, after = step(tokens[row, place], place, after)
        place += 1


def test_stablehlo_reads_prompts_so(tmp_path):
    model = decoder(True)[0].clone(vocabulary=257)
    params = nn.unbox(
        model.init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32), rows([[(0, 4)]], 4))["params"]
    )
    interop.write("stablehlo", str(tmp_path / "out"), model, lambda: params, ByteTokeniser())
    program = export.deserialize((tmp_path / "out/prefill.stablehlo").read_bytes()).call
    tokens = np.arange(LENGTH, dtype=np.int32)
    got = program(load_file(tmp_path / "out/weights.safetensors"), tokens[None], np.asarray([7], np.int32))[
        0
    ][0]
    near(got, logits(model, params, tokens, rows([[(7, 7)]], LENGTH))[6])
    assert np.abs(got - logits(model, params, tokens, rows([[(0, 7)]], LENGTH))[6]).max() > 1e-2


def test_a_batch_tells_where_sources_end(tmp_path):
    settings = {"model__name": "decoder", "model__encoder_layers": 0, "model__layers": 2}
    config = test_translate.configured(tmp_path, **settings)
    task, data = tasks.build(config), test_translate.opened(config)
    batch, nats = next(data.heldout_batches(2)), []
    model = models.build(config, data.vocabulary, 32)
    params = nn.unbox(model.init(jax.random.key(0), batch["tokens_BT"], rows([[(0, 32)]] * 2, 32)))["params"]
    for prefix_lm in (False, True):
        one = model.clone(config=dataclasses.replace(model.config, prefix_lm=prefix_lm))
        nats.append(float(jax.jit(functools.partial(task.loss, one))(params, batch)[0]))
    assert nats[0] != pytest.approx(nats[1], rel=1e-5)


def test_a_small_language_is_learnt_by_a_prefix_lm(tmp_path, capsys):
    settings = {"model__name": "decoder", "model__encoder_layers": 0, "model__prefix_lm": True}
    more = {"train__steps": 60, "generate__state": "int8", "task__sentences": 4}
    config = test_translate.configured(tmp_path, **settings, **more)
    loop.train(config, tmp_path / "run", test_translate.DEVICES)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["quality"]["bleu"] >= 0 and "nats_per_token_int8_state" not in result["quality"]
    capsys.readouterr()
    modes.generate(config, tmp_path / "run", {"source": ["old dog sees small cat"]})
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(
        UserError, match="config.model.prefix_lm: the formats of Llama and GPT-2 have no such"
    ):
        modes.export(None, tmp_path / "run", {"format": ["huggingface"], "output": [str(tmp_path / "out")]})


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"task__name": "text"},
            "config.model.prefix_lm: the task text has no sources (tasks that have: translate, answer)",
        ),
        (
            {"model__attention__name": "gla"},
            "config.model.prefix_lm: gla is not prefix_lm; variants that are prefix_lm: softmax",
        ),
        ({"model__pattern": ("softmax", "local")}, "config.model.prefix_lm: local is not prefix_lm"),
        (
            {"model__implementation": "pallas"},
            "config.model.implementation: pallas has no mask with a prefix",
        ),
        ({"model__implementation": "cudnn"}, "(allowed: auto, reference, xla)"),
        (
            {"model__name": "encoder_decoder", "model__encoder_layers": 1},
            "config.model.prefix_lm: is of a decoder",
        ),
        (
            {"task__name": "mlm", "model__name": "encoder", "model__bidirectional": True},
            "config.model.prefix_lm: the task mlm has no sources",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_says_so(tmp_path, settings, message):
    of_task = {"task__name": "translate", "data__source": f"gettext:{tmp_path}/*.mo"}
    of_task = {} if settings.get("task__name") else of_task
    test_translate.write_mo(tmp_path / "a.mo", {"one": "eins", "two": "zwei"})
    test_translate.write_mo(tmp_path / "b.mo", {"three": "drei", "four": "vier"})
    config = configured(tmp_path, model__prefix_lm=True, **of_task, **settings)
    with pytest.raises(UserError) as error:
        build_run(config, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_encoder_has_none():
    c = base.get_config()
    c.model.name, c.model.bidirectional, c.model.prefix_lm = "encoder", True, True
    with pytest.raises(
        UserError, match="config.model.prefix_lm: is of a decoder; an encoder has config.model.bid"
    ):
        models.build(c, 5, 8)
