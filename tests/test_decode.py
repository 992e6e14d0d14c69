"""Generation chooses the tokens that scoring the whole sequence would choose, for every variant."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from fastformer import models
from fastformer.attention import VARIANTS
from fastformer.core.errors import UserError
from fastformer.core.seq import whole
from fastformer.decode import GenerateConfig, decode_tokens_per_second, generate, sample
from fastformer.decode.generate import _generate

STREAMING = [name for name, variant in VARIANTS.items() if variant.streaming]
LENGTH, END = 48, 256


class Bytes:
    """The part of a tokeniser that generation needs."""

    eod = END

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return ",".join(map(str, ids))


def options(tokens=12, temperature=0.0, top_k=0, top_p=1.0, seed=0):
    return GenerateConfig(tokens, temperature, top_k, top_p, seed, "")


def untrained(name, positions="rope", pattern=()):
    c = base.get_config()
    c.model.width, c.model.heads, c.model.kv_heads = 24, 4, 2
    c.model.layers = len(pattern) or 1
    c.model.positions, c.model.pattern = positions, pattern
    c.model.attention = {"name": name, **VARIANTS[name].small}
    return models.build(c, END + 1, LENGTH)


@functools.lru_cache(maxsize=4)
def model_of(name, positions="rope", pattern=()):
    model = untrained(name, positions, pattern)
    init = jax.jit(model.init)
    params = nn.unbox(init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), whole(1, 4))["params"])
    # Larger weights than at the start: choices that hang on what was read before.
    return model, jax.tree.map(lambda a: 4.0 * a if a.ndim > 1 else a, params)


def by_scoring(model, params, prompts, tokens):
    """Return the greedy continuations, scoring the whole sequences anew for every token."""
    score = jax.jit(lambda ids, seq: model.apply({"params": params}, ids, seq)[0])
    rows = [[END, *prompt.encode()] for prompt in prompts]
    starts = [len(row) for row in rows]
    for _ in range(tokens):
        padded = np.asarray([row + [0] * (LENGTH - len(row)) for row in rows], np.int32)
        logits = np.asarray(score(padded, whole(len(rows), LENGTH)))
        for number, row in enumerate(rows):
            if row[-1] != END or len(row) == starts[number]:
                row.append(int(np.argmax(logits[number, len(row) - 1])))
    new = [row[start:] for row, start in zip(rows, starts)]
    return [",".join(str(token) for token in row if token != END) for row in new]


@pytest.mark.parametrize("name", STREAMING)
def test_greedy_is_what_scoring_chooses(name):
    model, params = model_of(name)
    prompts = ["def add(", "x", "a much longer prompt than those"]
    got = generate(model, params, Bytes(), prompts, options(), LENGTH)
    assert got == by_scoring(model, params, prompts, 12)
    assert len(set(got)) > 1 and len(set(",".join(got).split(","))) > 3


@pytest.mark.parametrize("positions", ["alibi", "sinusoidal", "learned", "none"])
def test_greedy_with_other_positions(positions):
    model, params = model_of("softmax", positions)
    if positions == "learned":
        with pytest.raises(UserError, match="48 learned positions"):
            generate(model, params, Bytes(), ["x" * 40], options(), LENGTH)
    else:
        got = generate(model, params, Bytes(), ["ab"], options(), LENGTH)
        assert got == by_scoring(model, params, ["ab"], 12)


HYBRIDS = [
    ("gated_delta", "gated_delta", "gated_delta", "softmax"),
    ("local", "softmax"),
    ("rg_lru", "rg_lru", "local"),
    ("based", "local"),
]


@pytest.mark.parametrize("pattern", HYBRIDS, ids="-".join)
def test_greedy_with_a_layer_pattern(pattern):
    model, params = model_of("local" if "local" in pattern else "softmax", pattern=pattern)
    got = generate(model, params, Bytes(), ["ab", "some more"], options(), LENGTH)
    assert got == by_scoring(model, params, ["ab", "some more"], 12)


def test_a_prompt_does_not_depend_on_those_beside_it():
    model, params = model_of("softmax")
    warm = options(temperature=1.0, seed=3)
    together = generate(model, params, Bytes(), ["one", "and two"], warm, LENGTH)
    assert generate(model, params, Bytes(), ["one", "another"], warm, LENGTH)[0] == together[0]
    assert (
        generate(model, params, Bytes(), ["one", "and two"], options(temperature=1.0, seed=4), LENGTH)
        != together
    )


def test_many_equal_prompts_are_continued_differently():
    model, params = model_of("linear")
    texts = generate(model, params, Bytes(), ["ab"] * 64, options(temperature=1.0), LENGTH)
    assert len(set(texts)) == 64


def test_samples_do_not_depend_on_the_lengths_of_others():
    model, params = model_of("linear")
    warm = options(temperature=1.0, seed=3)
    others = ["x" * (1 + number % 7) for number in range(40)]
    found = [
        generate(model, params, Bytes(), [*rest[:20], "ab", *rest[20:]], warm, LENGTH)[20]
        for rest in (others, others[::-1], ["long, longer"] * 40, ["x"] * 20)
    ]
    assert len(set(found)) == 1


def test_generation_stops_at_the_end_of_the_document():
    """The end that is looked for is a token that the model is known to choose."""
    model, params = model_of("softmax")

    free = generate(model, params, Bytes(), ["ab"], options(), LENGTH)[0].split(",")
    at = next(i for i, token in enumerate(free) if token not in free[:i] and i > 1)
    tokens = jnp.asarray([[END, *b"ab"] + [END] * 29], jnp.int32)
    new = _generate(model, options(), int(free[at]), params, tokens, jnp.asarray([3]), jnp.asarray([0]))
    assert new[0].tolist() == [int(t) for t in free[: at + 1]] + [int(free[at])] * (12 - at - 1)


LOGITS = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))


def draws(**how):
    keys = jax.random.split(jax.random.key(0), 4000)
    return np.asarray(
        sample(jnp.tile(LOGITS, (4000, 1)), keys, *({"t": 1.0, "k": 0, "p": 1.0} | how).values())
    )


def shares(tokens):
    return np.bincount(tokens, minlength=4) / len(tokens)


def test_sampling_follows_the_distribution():
    np.testing.assert_allclose(shares(draws()), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    hot = np.asarray([0.5, 0.3, 0.15, 0.05]) ** 0.5
    np.testing.assert_allclose(shares(draws(t=2.0)), hot / hot.sum(), atol=0.03)


def test_top_k_and_top_p_cut_the_tail():
    np.testing.assert_allclose(shares(draws(k=2)), [0.625, 0.375, 0, 0], atol=0.03)
    # 0.5 + 0.3 is below 0.9, and the token that crosses it is kept.
    np.testing.assert_allclose(shares(draws(p=0.9)), np.asarray([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)
    assert set(draws(p=0.4)) == {0} and set(draws(t=0.0)) == {0}


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": 3}])
def test_impossible_options_are_refused(bad):
    with pytest.raises(UserError):
        options(**bad)


def test_decoding_is_timed():
    model, params = model_of("linear")
    assert decode_tokens_per_second(model, params, tokens=4, repeats=1) > 0
