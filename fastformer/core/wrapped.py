"""A model that stands before another, as compression and decoding have it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Wrapped:
    """A model before another one; whatever it does not do itself, that one does.

    Attributes:
      inner: a linen module, or one more Wrapped.
    """

    inner: Any

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Return the initial variables, as ``linen.Module.init``."""
        return self.inner.init(*args, **kwargs)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs, as ``linen.Module.apply``."""
        return self.inner.apply(variables, *args, **kwargs)

    def at(self, step: jax.Array) -> Wrapped:
        """Return the model as it is trained after ``step`` updates, int32, traced or not."""
        return dataclasses.replace(self, inner=at(self.inner, step))

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):  # not there yet: while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)


def at(model: Any, step: jax.Array) -> Any:
    """Return ``model`` as it is trained after ``step`` updates; a linen module is always the same."""
    return model.at(step) if isinstance(model, Wrapped) else model


def within(model: Any, change: Callable[[Any], Any]) -> Any:
    """Return ``model`` with ``change`` made to the linen module at its bottom."""
    if isinstance(model, Wrapped):
        return dataclasses.replace(model, inner=within(model.inner, change))
    return change(model)


def bare(model: Any) -> Any:
    """Return the linen module at the bottom of ``model``."""
    return bare(model.inner) if isinstance(model, Wrapped) else model
