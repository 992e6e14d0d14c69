"""What tasks share that predict tokens from those before them: the loss, and how many are right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fastformer.tasks.task import Sums, Task, apply


@dataclass(frozen=True)
class NextToken(Task):
    """A batch holds tokens_BT, targets_BT (the tokens that come next), weights_BT (1 where the target
    counts), segment_BT and position_BT.
    """

    chunked = True

    def loss(self, model, params, batch, rng=None):
        nats_BT = apply(model, params, batch, rng, targets_BT=batch["targets_BT"])
        return jnp.sum(nats_BT * batch["weights_BT"]), jnp.sum(batch["weights_BT"])


@dataclass(frozen=True)
class Recalled(NextToken):
    """Tokens of which only some can be known, and those exactly: accuracy is what counts."""

    metric = "accuracy"
    higher = True

    def counted(self, length: int) -> int:
        """Return how many tokens of a row can be known at most; only they get logits in the loss."""
        raise NotImplementedError

    def loss(self, model, params, batch, rng=None):
        weights_BT = batch["weights_BT"]
        scored_BN = jax.lax.top_k(weights_BT, self.counted(weights_BT.shape[1]))[1]
        nats_BT = apply(model, params, batch, rng, targets_BT=batch["targets_BT"], scored_BN=scored_BN)
        return jnp.sum(nats_BT * weights_BT), jnp.sum(weights_BT)

    def totals(self, model, params, batch) -> Sums:
        return scored(apply(model, params, batch, None), batch["targets_BT"], batch["weights_BT"])

    def quality(self, sums, data, limit, overlap):
        return accuracy(sums)


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the summed nats of the targets that count, and their number.

    Args:
      logits: [..., V]; targets: [...]; weights: [...], 1 where a target counts.
    """
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(nats * weights), jnp.sum(weights)


def scored(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
    """Return what ``cross_entropy`` does, and how many of the targets are the likeliest."""
    nats, count = cross_entropy(logits, targets, weights)
    right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return {"nats": nats, "targets": count, "right": jnp.sum(right * weights)}


def accuracy(sums: Mapping[str, Any]) -> dict[str, float]:
    """Return the fraction of targets that are right, and the nats of each."""
    count = max(sums["targets"], 1)
    return {"accuracy": sums["right"] / count, "nats_per_target": sums["nats"] / count}


def perplexity(nats: float, targets: float) -> dict[str, float]:
    """Return nats per token and perplexity, the latter cut off where it is no longer a number."""
    mean = nats / max(targets, 1)
    return {"nats_per_token": mean, "perplexity": math.exp(min(mean, 700.0))}
