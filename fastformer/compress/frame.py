"""The frame: methods that a configuration names, one after another behind the same four hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import optax
from ml_collections import ConfigDict

from fastformer.compress.method import Calibration, Loss, Method, Place, at
from fastformer.compress.table import METHODS
from fastformer.core.config import section
from fastformer.core.errors import FieldError, UserError, lookup, nearest, require
from fastformer.core.values import check_kind

__all__ = ["Compression", "Loss", "Method", "at", "build"]


# Which comes before which where both are named: distillation looks at one loss, and linearisation has two;
# adapters are merged into weights before zeros are among them; integers are neither merged nor pruned.
BEFORE = (
    ("distil", "linearise"),
    ("linearise", "prune"),
    ("linearise", "quantise"),
    ("prune", "quantise"),
)


@dataclass(frozen=True)
class Compression:
    """The methods of a run.

    Attributes:
      methods: ``(name, method)``, in the order in which their hooks are called.
    """

    methods: tuple[tuple[str, Method], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.methods)

    def check(self) -> None:
        """Look, before anything is read, whether there is what training needs.

        Raises:
          UserError: there is not.
        """
        for name, method in self.methods:
            with _named(name):
                method.check()

    @property
    def begins_with(self) -> tuple[str, str]:
        """Return the key, and the workdir in it, of the run whose weights training begins with, if any."""
        for name, method in self.methods:
            if method.begins_with:
                return f"config.compress.{name}.{method.begins_with}", getattr(method, method.begins_with)
        return "", ""

    def frozen(self, model: Any, tokeniser: Any, place: Place) -> dict[str, Any]:
        """Return the arrays that losses read and nothing trains, by the methods' names.

        Raises:
          UserError: they do not fit the model or the text.
        """
        found = {}
        for name, method in self.methods:
            with _named(name):
                found[name] = method.frozen(model, tokeniser, place)
        return {name: value for name, value in found.items() if value is not None}

    def model(self, model: Any) -> Any:
        """Return the model to train, evaluate and decode with.

        Raises:
          UserError: a method does not fit the model.
        """
        for name, method in self.methods:
            with _named(name):
                model = method.on_model(model)
        return model

    def loss(self, loss: Loss) -> Loss:
        """Return the loss to train by."""
        for _, method in self.methods:
            loss = method.on_loss(loss)
        return loss

    def optimiser(self, tx: optax.GradientTransformation, model: Any) -> optax.GradientTransformation:
        """Return the optimiser to train ``model`` with."""
        for _, method in self.methods:
            tx = method.on_optimiser(tx, model)
        return tx

    def export(self, model: Any, params: Any, calibration: Calibration) -> Any:
        """Return the weights to deploy, which ``model`` runs from as it does from ``params``.

        Raises:
          UserError: a method cannot finish on these weights or this text.
        """
        for name, method in self.methods:
            with _named(name):
                params = method.on_export(model, params, calibration)
        return params

    def apart(self, model: Any) -> dict[str, Any]:
        """Return models, by name, that run from the same weights and whose quality is told besides."""
        found: dict[str, Any] = {}
        for _, method in self.methods:
            found |= method.apart(model)
        return found


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the method's section before the field of an error."""
    try:
        yield
    except FieldError as error:
        raise UserError(f"config.compress.{name}.{error.field}: {error.message}") from error


def build(config: ConfigDict) -> Compression:
    """Return the methods that the section ``compress`` names; every section is checked, named or not.

    Raises:
      UserError: an unknown method or key, a value that cannot be, a method named twice, or an order that
        cannot be.
    """
    known = ("methods", "batches", *METHODS)
    for key in config.compress:
        if key not in known:
            raise UserError(
                f"config.compress.{key}: no such key{nearest(key, known)} (keys: {', '.join(known)})"
            )
    for key in known:
        if key not in config.compress:
            raise UserError(f"config.compress.{key}: is missing; configs/base.py shows its default")
    check_kind(config.compress.batches, "int", "config.compress.batches")
    check_kind(config.compress.methods, "tuple[str, ...]", "config.compress.methods")
    good = 1 <= config.compress.batches <= 2**20
    require(good, "config.compress.batches", config.compress.batches, f"from 1 to {2**20:,}")
    owned = {name: section(cls, config, f"compress.{name}") for name, cls in METHODS.items()}
    names = tuple(config.compress.methods)
    for name in names:
        lookup(METHODS, name, "config.compress.methods")
        if names.count(name) > 1:
            raise UserError(f"config.compress.methods: {name} is named {names.count(name)} times")
    for first, second in BEFORE:
        if first in names and second in names and names.index(first) > names.index(second):
            raise UserError(f"config.compress.methods: {', '.join(names)}: name {first} before {second}")
    return Compression(tuple((name, owned[name]) for name in names))
