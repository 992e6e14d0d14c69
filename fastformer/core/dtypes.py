"""Which precision is used for what."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class Policy:
    """One precision of training. Whatever it is, weights, their moments and averages, norms, scores,
    softmax, decays, cumulative sums, states and the loss are float32.

    Attributes:
      compute: dtype of activations and of the products that they enter.
      scaled: gradients need a scale against underflow, found as training goes on (train.guard).
      product: dtype that both operands of a linear map are rounded to before their product, each
        channel to its own scale; "" is none.
      gradient: the same of the gradient that comes back to a linear map.
    """

    compute: jnp.dtype
    scaled: bool = False
    product: str = ""
    gradient: str = ""


POLICIES: dict[str, Policy] = {
    "float32": Policy(jnp.float32),
    "bfloat16": Policy(jnp.bfloat16),
    "float16": Policy(jnp.float16, scaled=True),
    "fp8": Policy(jnp.bfloat16, product="float8_e4m3fn", gradient="float8_e5m2"),  # as 2209.05433
}
# Compute dtypes by their name in the config.
COMPUTE = {name: policy.compute for name, policy in POLICIES.items()}
