"""Which dtype is used for what."""

from __future__ import annotations

import jax.numpy as jnp

# Compute dtypes by their name in the config. Weights, norms, scores, softmax, decays, cumulative
# sums and states are float32 whatever the compute dtype.
COMPUTE = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
