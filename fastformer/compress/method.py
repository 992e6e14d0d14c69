"""What a compression method may do: four hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from fastformer.core.wrapped import Wrapped, at, bare, within

__all__ = ["Calibration", "Loss", "Method", "Place", "Wrapped", "at", "bare", "within"]

Loss = Callable[[Any, Any, Mapping[str, jax.Array], jax.Array | None], tuple[jax.Array, jax.Array]]

Place = Callable[[jax.Array, tuple[str, ...]], jax.Array]


@dataclass(frozen=True)
class Calibration:
    """Text on which a finished model is looked at before it is stored.

    Attributes:
      batches: returns some training batches, always the same.
      loss: of the task.
    """

    batches: Callable[[], Iterator[Mapping[str, jax.Array]]]
    loss: Loss


class Method:
    """A compression method: a frozen dataclass of its section of the config, which redefines some hooks.

    A hook may raise FieldError for a value that does not fit the model; the frame names the section.
    """

    def check(self) -> None:
        """Look, before anything is read, whether there is what training needs.

        Raises:
          FieldError: there is not.
        """

    @property
    def begins_with(self) -> str:
        """Return the field that names the run whose weights training begins with; "" is none."""
        return ""

    def frozen(self, model: Any, tokeniser: Any, place: Place) -> Any:
        """Return arrays that the loss reads and nothing trains; the loss finds them in the batch.

        Args:
          place: puts an array on the mesh by the letters of its axes.

        Raises:
          FieldError: they do not fit the model or the text.
        """
        return None

    def on_model(self, model: Any) -> Any:
        """Return the model to train, evaluate and decode with in place of ``model``."""
        return model

    def on_loss(self, loss: Loss) -> Loss:
        """Return the loss to train by: ``(model, params, batch, rng) -> (nats, targets)``."""
        return loss

    def on_optimiser(self, tx: optax.GradientTransformation, model: Any) -> optax.GradientTransformation:
        """Return the optimiser to train ``model`` with."""
        return tx

    def on_export(self, model: Any, params: Any, calibration: Calibration) -> Any:
        """Return the weights to deploy: what is stored, and what ``model`` then runs from."""
        return params

    def apart(self, model: Any) -> dict[str, Any]:
        """Return models, by name, that run from the same weights; their quality tells what does the work."""
        return {}
