"""A model that reads a row as decoding does: one token after another, through its state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fastformer.core.seq import Seq
from fastformer.core.wrapped import Wrapped


@dataclass(frozen=True)
class TokenByToken(Wrapped):
    """A decoder whose every output has gone through its state; T calls for a row of T tokens."""

    def apply(
        self,
        variables: Any,
        tokens_BT: jax.Array,
        seq: Seq,
        targets_BT: jax.Array | None = None,
        scored_BN: jax.Array | None = None,
        **options: Any,
    ) -> tuple[jax.Array, Any]:
        """Return the outputs of all tokens, whichever count, and the last state, as linen's apply."""

        def one(state: Any, token: tuple) -> tuple[Any, jax.Array]:
            token_B1, seq, target_B1 = jax.tree.map(lambda x: x[:, None], token)
            more = options if target_B1 is None else {**options, "targets_BT": target_B1}
            y, state = self.inner.apply(variables, token_B1, seq, state, **more)
            return state, y[:, 0]

        start = self.inner.init_state(*tokens_BT.shape)
        tokens_TB = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (tokens_BT, seq, targets_BT))
        state, y_TB = jax.lax.scan(one, start, tokens_TB)
        return jnp.moveaxis(y_TB, 0, 1), state
