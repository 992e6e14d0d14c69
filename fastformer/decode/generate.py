"""Prefill the prompts, then decode token by token on the variant's state, in one compiled loop."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastformer.core.errors import UserError
from fastformer.decode.beam import beam_search
from fastformer.decode.sample import sample
from fastformer.decode.steps import GenerateConfig, decode_step, prefill
from fastformer.decode.stored import stored

ROWS = 32  # prompts that are completed at once, at most
PREFILL = 32  # prompts are padded to a multiple of this many tokens, so that few programs are compiled


def generate(
    model: nn.Module,
    params: Any,
    tokeniser: Any,
    prompts: Sequence[str],
    options: GenerateConfig,
    length: int,
) -> list[str]:
    """Return what follows each prompt, up to ``options.tokens`` tokens or the end of its document.

    Args:
      length: T that the model was trained at, the most that learned positions can hold.

    Raises:
      UserError: prompt and continuation are longer than learned positions reach.
    """
    # A document begins with the token that ends the one before.
    rows = [[tokeniser.eod, *tokeniser.encode(prompt)] for prompt in prompts]
    return [tokeniser.decode(ids) for ids in complete(model, params, rows, tokeniser.eod, options, length)]


def complete(
    model: nn.Module,
    params: Any,
    rows: Sequence[Sequence[int]],
    end: int,
    options: GenerateConfig,
    length: int,
) -> list[list[int]]:
    """Return the tokens that follow each row, up to ``options.tokens`` or ``end``, which is left out.

    A row's tokens do not depend on the rows beside it, nor its random numbers on anything but the
    seed and its place. ROWS of about the same length are completed at once.

    Args:
      length: T that the model was trained at, the most that learned positions can hold.

    Raises:
      UserError: prompt and continuation are longer than learned positions reach.
    """
    check_rows(model, rows, options, length)
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    size = min(ROWS, len(rows))  # of a batch; the last of several is filled up, so that one program does
    done: dict[int, list[int]] = {}
    for start in range(0, len(rows), ROWS):
        places = order[start : start + ROWS]
        filled = places + places[-1:] * (size - len(places))
        new = _complete(model, params, [rows[place] for place in filled], filled, end, options, length)
        done |= zip(places, new)
    return [done[place] for place in range(len(rows))]


def check_rows(model: nn.Module, rows: Sequence[Sequence[int]], options: GenerateConfig, length: int) -> None:
    """Check that rows can be completed, as ``complete`` has them.

    Raises:
      UserError: they cannot.
    """
    if options.beams > 1 and model.config.scan:
        raise UserError("config.generate.beams: a model with scanned layers (config.model.scan) takes 1 only")
    if model.config.positions != "learned" or not rows:
        return
    longest = max(map(len, rows))
    apart = model.reads_sources  # a source and its target have positions of their own
    most, after = (length, "") if apart else (length - longest, f" after a prompt of {longest}")
    if longest > length or most < 1:
        raise UserError(
            f"config.data.length: {length} learned positions are too few for a prompt of {longest} tokens "
            "(given, or of what the task decodes) and what follows; give a shorter prompt, a larger length, "
            "or config.model.positions that are not learned"
        )
    if options.tokens > most:
        raise UserError(
            f"config.generate.tokens: {options.tokens} more{after} are beyond the {length} learned positions "
            f"of this model (config.data.length); give at most {most}"
        )


def _complete(
    model: nn.Module,
    params: Any,
    rows: Sequence[Sequence[int]],
    places: Sequence[int],
    end: int,
    options: GenerateConfig,
    length: int,
) -> list[list[int]]:
    """Return the tokens that follow each row of a batch, as ``complete``.

    Args:
      places: of the rows among all prompts.
    """
    longest = max(map(len, rows))
    padded = -(-longest // PREFILL) * PREFILL
    if longest <= length:  # what the model learned a place for, padding has one too
        padded = min(padded, length)
    tokens_BT = np.full((len(rows), padded), end, np.int32)
    for row, ids in enumerate(rows):
        tokens_BT[row, : len(ids)] = ids
    lengths_B = np.asarray([len(ids) for ids in rows], np.int32)
    model = stored(model, options.state)
    if options.beams == 1:
        new_BT = _generate(model, options, end, params, tokens_BT, lengths_B, np.asarray(places, np.int32))
    else:
        new_BT = beam_search(model, options, end, params, tokens_BT, lengths_B)
    return [_until(ids, end) for ids in np.asarray(new_BT).tolist()]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(model, options: GenerateConfig, end: int, params, tokens_BT, lengths_B, places_B) -> jax.Array:
    """Return the new tokens, [B, options.tokens], ``end`` after the end of a document.

    Args:
      places_B: of the rows among all prompts, int32, for their random numbers.
    """
    batch, padded = tokens_BT.shape
    capacity = padded + options.tokens
    logits_BV, state, position_B = prefill(model, params, tokens_BT, lengths_B, capacity, end)
    # Keys differ by prompt, and by step below.
    keys_B = jax.vmap(lambda place: jax.random.fold_in(jax.random.key(options.seed), place))(places_B)

    def unfinished(carry) -> jax.Array:
        step, done_B = carry[0], carry[1]
        return (step < options.tokens) & ~jnp.all(done_B)

    def step_on(carry):
        step, done_B, logits_BV, state, new_BT = carry
        keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys_B)
        token_B = sample(logits_BV, keys, options.temperature, options.top_k, options.top_p)
        token_B = jnp.where(done_B, end, token_B)
        new_BT = jax.lax.dynamic_update_index_in_dim(new_BT, token_B, step, axis=1)
        done_B = done_B | (token_B == end)
        logits_BV, state = decode_step(model, params, token_B, position_B + step, ~done_B, state)
        return step + 1, done_B, logits_BV, state, new_BT

    new_BT = jnp.full((batch, options.tokens), end, jnp.int32)
    start = (jnp.zeros((), jnp.int32), jnp.zeros((batch,), bool), logits_BV, state, new_BT)
    return jax.lax.while_loop(unfinished, step_on, start)[-1]


def decode_tokens_per_second(
    model: nn.Module, params: Any, batch: int = 1, tokens: int = 64, repeats: int = 5
) -> float:
    """Return tokens a second of greedy decoding on the state of the trained length, a median.

    Args:
      batch: rows decoded at once; all of their tokens count.
      tokens: decoded in each repeat.
    """
    capacity = max(model.length, tokens)

    @jax.jit
    def run(params) -> jax.Array:
        def one(carry, step):
            token_B, state = carry
            position_B = jnp.full((batch,), capacity - tokens, jnp.int32) + step
            logits_BV, state = decode_step(
                model, params, token_B, position_B, jnp.ones((batch,), bool), state
            )
            return (jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), state), token_B

        start = (jnp.zeros((batch,), jnp.int32), model.init_state(batch, capacity))
        return jax.lax.scan(one, start, jnp.arange(tokens, dtype=jnp.int32))[1]

    run(params).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(params).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return batch * tokens / float(np.median(seconds))
