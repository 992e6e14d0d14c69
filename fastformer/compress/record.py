"""What a model returned and what went on inside it, kept while a loss runs it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import optax

from fastformer.compress.method import Wrapped
from fastformer.core.layers import Linear
from fastformer.models.block import Block

RELATED = ("query", "key", "value")


class Call(NamedTuple):
    """One call of a model.

    Attributes:
      args, kwargs: of ``apply``, without the variables and the targets.
      logits: [B, T, V], or [B, classes].
      inner: outputs of blocks and of the last mixer's projections, as flax's intermediates; {} if not asked.
    """

    args: tuple
    kwargs: dict[str, Any]
    logits: jax.Array
    inner: Any

    def blocks(self) -> list[jax.Array]:
        """Return what every block returned, [B, T, D] each."""
        return [self.inner[f"layer_{layer}"]["__call__"][0][0] for layer in range(self._layers())]

    def related(self) -> list[jax.Array]:
        """Return the last mixer's queries, keys and values, [B, T, heads, width] each."""
        mixer = self.inner[f"layer_{self._layers() - 1}"]["mixer"]
        return [mixer[name]["__call__"][0] for name in RELATED]

    def _layers(self) -> int:
        return sum(name.startswith("layer_") for name in self.inner)


@dataclass(frozen=True)
class Recorder(Wrapped):
    """A model that keeps its calls, in ``calls``; each holds for the trace in which it was made.

    Attributes:
      inside: whether inner states are kept too.
    """

    inside: bool = False
    calls: list[Call] = dataclasses.field(default_factory=list)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs, as ``linen.Module.apply``; logits are kept, also where nats are asked for."""
        targets = kwargs.pop("targets_BT", None)
        kwargs.pop("scored_BN", None)  # all logits are kept
        if self.inside:
            more = {"capture_intermediates": _wanted, "mutable": ["intermediates"]}
            (logits, state), found = self.inner.apply(variables, *args, **kwargs, **more)
        else:
            (logits, state), found = self.inner.apply(variables, *args, **kwargs), {}
        self.calls.append(Call(args, kwargs, logits, found.get("intermediates", {})))
        if targets is None:
            return logits, state
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets), state


def _wanted(module: Any, method: str) -> bool:
    named = isinstance(module, Linear) and module.name in RELATED
    return method == "__call__" and (isinstance(module, Block) or named)
