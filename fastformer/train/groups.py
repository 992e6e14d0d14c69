"""Which parameters decay, and rules by path that give some a learning rate or a decay of their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax

from fastformer.core.errors import FieldError, UserError, nearest, require
from fastformer.core.trees import SCANNED

# Decayed are the matrices of linear maps and the embedding, which is the output matrix too when
# tied. Whatever has another name (norms' scales, biases, gates, decays, learned positions) is not,
# even if it has two dimensions.
DECAYED = ("weight", "embedding")
FORM = "(pattern, rate, decay or None)"


@dataclass(frozen=True)
class Group:
    """A rule: the parameters whose path holds ``pattern`` and that no earlier rule took.

    Attributes:
      pattern: a regular expression, searched for in paths such as ``layer_0/mixer/q/weight``.
      rate: times the learning rate; 0 freezes.
      decay: weight decay of all of them, vectors too; None is as without the rule.
    """

    pattern: str
    rate: float
    decay: float | None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise FieldError("pattern", f"{self.pattern!r} is no regular expression: {error}") from error
        require(self.rate >= 0, "rate", self.rate, "0 (frozen) or more")
        if self.decay is not None:
            require(self.decay >= 0, "decay", self.decay, "0 or more, or None")


def read(rules: Any) -> tuple[Group, ...]:
    """Return the groups that ``((pattern, rate, decay), …)`` says.

    Raises:
      FieldError: one is not of that form.
    """
    found = []
    for index, rule in enumerate(rules):
        if not (isinstance(rule, (tuple, list)) and len(rule) == 3 and isinstance(rule[0], str)):
            raise FieldError(f"groups[{index}]", f"{rule!r} is not {FORM}")
        try:
            found.append(Group(*rule))
        except FieldError as error:
            raise FieldError(f"groups[{index}]", str(error)) from error
        except TypeError as error:
            raise FieldError(f"groups[{index}]", f"{rule!r} is not {FORM}") from error
    return tuple(found)


def names(path: tuple) -> list[str]:
    """Return the names along a path of a parameter tree, without the boxes around its arrays."""
    return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]


def stacked(path: tuple) -> int:
    """Return the number of leading axes that are layers: 1 in scanned layers, else 0."""
    return int(names(path)[0] == SCANNED)


def decayed(params: Any) -> Any:
    """Return a tree of booleans: which parameters weight decay pulls towards 0."""

    def is_matrix(path: tuple, leaf: Any) -> bool:
        return names(path)[-1] in DECAYED and leaf.ndim - stacked(path) >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def of(path: tuple, groups: tuple[Group, ...]) -> Group | None:
    """Return the first group that a parameter is of."""
    joined = "/".join(names(path))
    return next((group for group in groups if re.search(group.pattern, joined)), None)


def check(groups: tuple[Group, ...], params: Any) -> None:
    """Check that every rule takes a parameter.

    Raises:
      UserError: one does not; all it matches, if any, an earlier rule has.
    """
    flat = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    taken = {id(of(path, groups)) for path in flat}
    for index, group in enumerate(groups):
        if id(group) in taken:
            continue
        joined = sorted({"/".join(names(path)) for path in flat})
        matched = [path for path in joined if re.search(group.pattern, path)]
        why = "earlier rules have all that it matches" if matched else "it matches no parameter"
        hint = "" if matched else nearest(group.pattern, joined) or f" (there is {joined[0]}, for one)"
        raise UserError(f"config.optimiser.groups[{index}]: {group.pattern!r}: {why}{hint}")


def decay(groups: tuple[Group, ...], weight_decay: float) -> list[optax.GradientTransformation]:
    """Return what adds each parameter's own decay to its update."""

    def at(value: float) -> Callable[[Any], Any]:
        def mask(params: Any) -> Any:
            def mine(path: tuple, default: bool) -> bool:
                group = of(path, groups)
                own = None if group is None else group.decay
                return own == value if own is not None else default and value == weight_decay

            return jax.tree_util.tree_map_with_path(mine, decayed(params))

        return mask

    values = sorted({weight_decay, *(group.decay for group in groups if group.decay is not None)})
    return [optax.add_decayed_weights(value, at(value)) for value in values if value]


def rates(groups: tuple[Group, ...]) -> list[optax.GradientTransformation]:
    """Return what multiplies each update by its group's rate; it checks the rules when it begins."""
    if not groups:
        return []

    def init(params: Any) -> optax.EmptyState:
        check(groups, params)
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        def scale(path: tuple, x: jax.Array) -> jax.Array:
            group = of(path, groups)
            return x if group is None else x * group.rate

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return [optax.GradientTransformation(init, update)]
