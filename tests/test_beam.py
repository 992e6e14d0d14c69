"""Beam search finds what an exhaustive search finds, and keeps to the order of what it is given."""

from __future__ import annotations

import functools
import importlib
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from fastformer import models
from fastformer.compress.method import Wrapped
from fastformer.core.errors import UserError
from fastformer.core.seq import Seq, whole
from fastformer.decode import GenerateConfig, complete
from fastformer.decode.beam import beam_search
from fastformer.models import Source

LENGTH, END, TOKENS = 16, 4, 3
ALL = 1 + 4 + 16 + 64  # texts of up to two tokens and the end, and those of three
ONE = jnp.asarray([[END]]), jnp.asarray([1])  # a prompt, and its length
PROMPTS = [[END, 1, END], [END, 2, 0, 3, END], [END, 3, END]]


@functools.cache
def model_of(kind, mixer="softmax"):
    c = base.get_config()
    c.model.prefix_lm = kind == "prefix_lm"
    # The first layer sees a source as it was embedded, whichever way: what else it sees is for the second.
    c.model.name, c.model.layers = ("decoder", 2) if c.model.prefix_lm else (kind, 1)
    c.model.width, c.model.heads, c.model.encoder_layers = 16, 2, 1 if kind == "encoder_decoder" else 0
    c.model.attention.name, c.model.tied = mixer, False  # a tied embedding says the same again and again
    model = models.build(c, END + 1, LENGTH)
    source = {"source": Source(jnp.zeros((1, 4), jnp.int32), whole(1, 4))} if c.model.encoder_layers else {}
    params = model.init(jax.random.key(4), jnp.zeros((1, 4), jnp.int32), whole(1, 4), **source)["params"]
    return model, jax.tree.map(lambda a: 4.0 * a if a.ndim > 1 else a, nn.unbox(params))


def options(beams, alpha=0.6, tokens=TOKENS):
    return GenerateConfig(tokens, 0.0, 0, 1.0, 0, "", beams, alpha)


@functools.cache
def scorer(kind, mixer="softmax"):
    """Return a compiled ``(tokens, lengths, source, source lengths) -> log-probabilities of all tokens``."""
    model, params = model_of(kind, mixer)

    def seq_of(tokens, lengths):
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return Seq((at < lengths[:, None]).astype(jnp.int32), at)

    def score(tokens, lengths, sources, source_lengths):
        source = Source(sources, seq_of(sources, source_lengths))
        source = {"source": source} if model.config.encoder_layers else {}
        seq = seq_of(tokens, lengths)
        last_BT = None if source else jnp.maximum(seq.position_BT, source_lengths[:, None] - 1)
        logits = model.apply({"params": params}, tokens, seq._replace(last_BT=last_BT), **source)[0]
        logp = jax.nn.log_softmax(logits, axis=-1)
        return jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]

    return jax.jit(score)


def log_probabilities(kind, prompt, texts, mixer="softmax"):
    """Return the log-probability of each text after the prompt, scored as a whole, [texts]."""
    before = [END] if kind == "encoder_decoder" else prompt
    tokens, sources = np.zeros((ALL, 12), np.int32), np.zeros((ALL, 12), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(before) + len(text)] = [*before, *text]
        sources[row, : len(prompt)] = prompt
    lengths = np.asarray([len(before) + len(text) for text in texts] + [1] * (ALL - len(texts)))
    logp = np.asarray(scorer(kind, mixer)(tokens, lengths, sources, np.full(ALL, len(prompt))))
    spans = [slice(len(before) - 1, len(before) - 1 + len(text)) for text in texts]
    return np.asarray([logp[row, span].sum() for row, span in enumerate(spans)])


def best(kind, prompt, alpha):
    """Return the best text by trying all: those that end, and those cut off after TOKENS tokens."""
    texts = [text for size in range(TOKENS + 1) for text in itertools.product(range(END), repeat=size)]
    texts = [(*text, END)[:TOKENS] for text in texts]
    sizes = np.asarray([len(text) for text in texts])
    scores = log_probabilities(kind, prompt, texts) / ((5 + sizes) / 6) ** alpha
    return [token for token in texts[np.argmax(scores)] if token != END]


def searched(logp, width, alpha, limit):
    """Return what a beam search finds, in plain Python; ``logp(text)`` is of each next token."""
    beams, ended = [(0.0, ())], [(-np.inf, ())]
    for step in range(limit):
        each = [(total + x, (*text, token)) for total, text in beams for token, x in enumerate(logp(text))]
        ranked = sorted(each, reverse=True)[: 2 * width]
        scale = ((5 + step + 1) / 6) ** alpha
        ended += [(total / scale, text[:-1]) for total, text in ranked[:width] if text[-1] == END]
        beams = [(total, text) for total, text in ranked if text[-1] != END][:width]
    return list(max(ended + [(total / scale, text) for total, text in beams])[1])


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder", "prefix_lm"])
@pytest.mark.parametrize("alpha", [0.0, 8.0])
def test_a_beam_that_holds_all_finds_the_best(kind, alpha):
    model, params = model_of(kind)
    found = complete(model, params, PROMPTS, END, options(80, alpha), LENGTH)
    assert found == [best(kind, prompt, alpha) for prompt in PROMPTS]


class Always:
    """A model that always says the same."""

    reads_sources = False

    def __init__(self, *probabilities):
        self.probabilities = probabilities

    def init_state(self, batch, capacity):
        return jnp.zeros((batch, 1))

    def apply(self, params, tokens, seq, state):
        logits = jnp.log(jnp.asarray(self.probabilities))
        return jnp.broadcast_to(logits[None, None], (*tokens.shape, len(logits))), state


class Trigrams(Always):
    """A model whose next token hangs on the last two, one of which is its state; its table is its params."""

    def init_state(self, batch, capacity):
        return jnp.full((batch, 1), END)

    def apply(self, params, tokens, seq, state):
        before = jnp.concatenate([state, tokens], axis=1)
        return params["params"][before[:, :-1], before[:, 1:]], tokens[:, -1:]


TRIGRAMS = Trigrams()


def after(table, text):
    """Return the log-probabilities of each next token, by the last two."""
    return table[(END, END, *text)[-2], (END, *text)[-1]]


@pytest.mark.parametrize("width", [2, 3, 5])
def test_narrow_beams_are_those_of_a_plain_search(width):
    """Many tables, so that some texts end early and some not; a penalty makes them longer."""
    lengths = {}
    for alpha, seed in itertools.product((0.0, 0.6, 3.0), range(12)):
        draws = jax.random.normal(jax.random.key(seed), (END + 1, END + 1, END + 1))
        table = np.asarray(jax.nn.log_softmax(1.5 * draws))
        found = beam_search(TRIGRAMS, options(width, alpha, 6), END, table, *ONE)[0].tolist()
        wanted = searched(functools.partial(after, table), width, alpha, 6)
        assert found == [*wanted, *[END] * (6 - len(wanted))]
        lengths.setdefault(alpha, []).append(len(wanted))
    assert 0 < sum(lengths[0.0]) <= sum(lengths[0.6]) < sum(lengths[3.0]) < 6 * 12


def test_unlikely_ends_are_not_found():
    """Sixty-four tokens, each likelier than the end: no beam of two sees it among its best."""
    model = Always(*[0.999 / 64] * 64, 0.001)
    assert 64 not in np.asarray(beam_search(model, options(2, 0.6, 8), 64, {}, *ONE))


def test_what_is_cut_off_competes_with_what_ended():
    """To end at once has 0.4, to write three times 0.6 to the third: that wins by a high penalty alone."""
    model, tokens, lengths = Always(0.6, 0.0, 0.4), jnp.asarray([[2]]), jnp.asarray([1])
    for alpha, wanted in ((0.0, [2, 2, 2]), (3.0, [0, 0, 0])):
        assert (np.log(0.4) < 3 * np.log(0.6) / (8 / 6) ** alpha) == (wanted == [0, 0, 0])
        assert beam_search(model, options(2, alpha, 3), 2, {}, tokens, lengths)[0].tolist() == wanted


def test_the_penalty_counts_the_end():
    """To end at once has 0.3, ``0`` and the end 0.457 times 0.3: 6 and 7 sixths to the power of alpha."""
    first, then = [0.457, 0.081, 0.081, 0.081, 0.3], [0.175, 0.175, 0.175, 0.175, 0.3]
    table = jnp.log(jnp.asarray(then))[None, None] * jnp.ones((END + 1, END + 1, 1))
    table = table.at[END, END].set(jnp.log(jnp.asarray(first)))
    for alpha, wanted in ((3.0, [END, END]), (5.0, [0, END])):
        worth = [np.log(0.3), np.log(0.3 * 0.457) / (7 / 6) ** alpha]
        assert (worth[0] > worth[1]) == (wanted == [END, END])
        assert beam_search(TRIGRAMS, options(4, alpha, 2), END, table, *ONE)[0].tolist() == wanted


@pytest.mark.parametrize("kind, mixer", [("encoder_decoder", "linear"), ("decoder", "local")])
def test_beams_take_their_states_along(kind, mixer):
    """A beam that took another's state would believe in scores that its text does not have."""
    model, params = model_of(kind, mixer)

    def following(prompt, text):
        texts = [text, *((*text, token) for token in range(END + 1))]
        before, *each = log_probabilities(kind, prompt, texts, mixer)
        return np.asarray(each) - before

    found = complete(model, params, PROMPTS, END, options(3, 0.6, 6), LENGTH)
    assert found == [searched(functools.partial(following, prompt), 3, 0.6, 6) for prompt in PROMPTS]


def test_many_prompts_are_completed_in_their_order(monkeypatch):
    model, params = model_of("encoder_decoder")
    prompts = [[END, *(i % 4 for i in range(n)), END] for n in (5, 1, 3, 2, 4, 6, 0)]
    together = complete(model, params, prompts, END, options(1), LENGTH)
    monkeypatch.setattr(importlib.import_module("fastformer.decode.generate"), "ROWS", 3)
    assert complete(model, params, prompts, END, options(1), LENGTH) == together
    assert len(set(map(tuple, together))) > 1


def test_a_wrapped_model_reads_its_sources_too():
    """Compression stands before a model; prompts must not become targets by that."""
    model, params = model_of("encoder_decoder")
    plain = complete(model, params, PROMPTS, END, options(1), LENGTH)
    assert complete(Wrapped(model), params, PROMPTS, END, options(1), LENGTH) == plain
    assert len(set(map(tuple, plain))) > 1


def test_a_target_sees_its_own_source_alone():
    model, params = model_of("encoder_decoder")
    score = jax.jit(lambda *batch: model.apply({"params": params}, *batch[:2], source=batch[2])[0])
    source, target = jnp.asarray([[1, 2, 3, 0, 2]]), jnp.asarray([[4, 1, 4, 2]])
    packed = Seq(jnp.asarray([[1, 1, 1, 2, 2]]), jnp.asarray([[0, 1, 2, 0, 1]]))
    halves = Seq(jnp.asarray([[1, 1, 2, 2]]), jnp.asarray([[0, 1, 0, 1]]))
    both = score(target, halves, Source(source, packed))
    first = score(target[:, :2], whole(1, 2), Source(source[:, :3], whole(1, 3)))
    second = score(target[:, 2:], whole(1, 2), Source(source[:, 3:], whole(1, 2)))
    np.testing.assert_allclose(both, jnp.concatenate([first, second], axis=1), atol=1e-5)
    # The last token of a source reaches its first: the encoder looks both ways.
    contexts = [
        model.apply({"params": params}, target, whole(1, 4), source=Source(tokens, packed))[1].context.x_BSD
        for tokens in (source, source.at[0, 2].set(0))
    ]
    moved = np.abs(contexts[0] - contexts[1]).max(axis=-1)[0]
    assert moved[:3].min() > 1e-6 and moved[3:].max() == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"encoder_layers": 0}, "config.model.encoder_layers: 0 is not allowed"),
        ({"name": "decoder"}, "config.model.encoder_layers: a decoder has none"),
        ({"attention": {"name": "delta"}}, "delta is not bidirectional; variants that are bidirectional"),
        ({"encoder_pattern": ("softmaxx",)}, "config.model.encoder_pattern[0]: 'softmaxx' is unknown"),
    ],
    ids=str,
)
def test_what_an_encoder_decoder_cannot_be(settings, message):
    c = base.get_config()
    c.model.name, c.model.encoder_layers = "encoder_decoder", 1
    for key, value in settings.items():
        c.model[key] = value
    with pytest.raises(UserError) as error:
        models.build(c, 5, 8)
    assert message in str(error.value) and "\n" not in str(error.value)
    c.model.name, c.model.encoder_layers, c.model.encoder_pattern = "encoder_decoder", 1, ("softmax",)
    c.model.short_conv, c.model.attention = -1, {"name": "delta"}
    assert models.build(c, 5, 8)  # a causal decoder beside an encoder that sees both ways
