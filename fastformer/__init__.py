"""fastformer: faster and smaller Transformers in JAX and Flax."""
