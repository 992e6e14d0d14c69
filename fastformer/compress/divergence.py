"""How far a student is from its teacher, per token: distributions, relations, hidden states."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def forward_kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Return KL(teacher | student) of log-probabilities [..., V], [...] (Hinton et al. 2015, 1503.02531)."""
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def reverse_kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Return KL(student | teacher), [...], which seeks a mode (Gu et al. 2023, 2306.08543, eq. 1)."""
    return forward_kl(teacher, student)


def jensen_shannon(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Return half the KL of each to the mean of both, [...] (Agarwal et al. 2023, 2306.13649, eq. 1)."""
    mean = jnp.logaddexp(student, teacher) - jnp.log(2.0)
    return 0.5 * (forward_kl(mean, teacher) + forward_kl(mean, student))


DIVERGENCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jensen_shannon": jensen_shannon,
}


def of_logits(name: str, student_BTV: jax.Array, teacher_BTV: jax.Array, temperature: float) -> jax.Array:
    """Return the divergence of each token in nats, [B, T], times temperature squared.

    So its gradients are as large at any temperature (Hinton et al. 2015, 1503.02531, section 2.1).
    """
    student, teacher = (
        jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (student_BTV, teacher_BTV)
    )
    return DIVERGENCES[name](student, teacher) * temperature**2


def of_relations(
    student_BTHK: jax.Array, teacher_BTHK: jax.Array, heads: int, segment_BT: jax.Array
) -> jax.Array:
    """Return the KL of how each token relates to those of its segment, [B, T], the mean of ``heads``.

    A relation is the softmax of scaled products of the same kind of vector, all heads of it cut anew
    into ``heads``, so that the two may differ in heads and width (Wang et al. 2020, 2012.15828, section
    3.1; first in 2002.10957, eq. 8).
    """
    seen_B1TS = (segment_BT[:, None, :, None] == segment_BT[:, None, None, :]) & (segment_BT > 0)[
        :, None, None, :
    ]

    def relation(x_BTHK: jax.Array) -> jax.Array:
        x_BTHK = x_BTHK.reshape(*x_BTHK.shape[:2], heads, -1).astype(jnp.float32)
        scores = jnp.einsum("BTHK,BSHK->BHTS", x_BTHK, x_BTHK) * x_BTHK.shape[-1] ** -0.5
        return jax.nn.log_softmax(jnp.where(seen_B1TS, scores, -1e30))

    student, teacher = relation(student_BTHK), relation(teacher_BTHK)
    return jnp.mean(forward_kl(student, teacher), axis=1)


def of_hidden(mapped_BTD: jax.Array, teacher_BTD: jax.Array) -> jax.Array:
    """Return the squared error of each token over its teacher's mean square, [B, T].

    (A learned map first: Romero et al. 2014, 1412.6550, eq. 3; here for every layer.)
    """
    teacher_BTD = teacher_BTD.astype(jnp.float32)
    size_BT = jnp.mean(teacher_BTD**2, axis=-1)
    return jnp.mean((mapped_BTD.astype(jnp.float32) - teacher_BTD) ** 2, axis=-1) / (size_BT + 1e-6)
