"""Distillation: a student learns from the distributions, and the inner states, of a frozen teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.compress.divergence import DIVERGENCES, of_hidden, of_logits, of_relations
from fastformer.compress.method import Calibration, Loss, Method, Place, Wrapped, bare
from fastformer.compress.record import RELATED, Call, Recorder
from fastformer.compress.sites import sites
from fastformer.compress.teacher import Teacher, find, open_teacher
from fastformer.core.dtypes import COMPUTE
from fastformer.core.errors import FieldError, UserError, lookup, require
from fastformer.models import Decoder

KEY = "distil"  # of the teacher's weights in the batch, and of the learned maps in the student's


@dataclass(frozen=True)
class Mapped(Wrapped):
    """A model with one more matrix a layer among its weights, which only a loss reads.

    Attributes:
      width: D of the teacher.
    """

    width: int

    def init(self, key: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the initial variables; a map begins small and random."""
        variables = self.inner.init(key, *args, **kwargs)
        config, normal = bare(self).config, nn.initializers.normal(bare(self).config.width ** -0.5)
        init = nn.with_logical_partitioning(normal, ("D", "R"))
        keys = jax.random.split(jax.random.fold_in(key, 1), config.layers)
        maps = {
            f"layer_{layer}": {"weight": init(keys[layer], (config.width, self.width))}
            for layer in range(config.layers)
        }
        return {**variables, "params": {**variables["params"], KEY: maps}}

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs, as ``linen.Module.apply``."""
        params = {name: value for name, value in variables["params"].items() if name != KEY}
        return self.inner.apply({**variables, "params": params}, *args, **kwargs)


@dataclass(frozen=True)
class Distil(Method):
    """Learn from a teacher: ``(1 - weight) nats + weight divergence + hidden error + relations``.

    The teacher is a finished run of ours; it may differ in depth, width and attention, not in its
    tokeniser. It is never trained, and stands in no checkpoint of the student.

    Attributes:
      teacher: its workdir.
      divergence: a row of DIVERGENCES. temperature: of both distributions. weight: of the divergence.
      hidden: weight of the error of the student's layers, each mapped by a learned matrix to the teacher's
        layer at the same fraction of its depth. The maps are trained and checkpointed, and not deployed.
      relations: weight of the relations of the last layer's queries, keys and values.
      relation_heads: that they are cut into.
      dtype: of the teacher.

    Raises:
      FieldError: a value that cannot be.
    """

    teacher: str
    divergence: str
    temperature: float
    weight: float
    hidden: float
    relations: float
    relation_heads: int
    dtype: str

    def __post_init__(self) -> None:
        lookup(DIVERGENCES, self.divergence, "divergence")
        lookup(COMPUTE, self.dtype, "dtype")
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "above 0 and finite")
        require(0 <= self.weight <= 1, "weight", self.weight, "from 0 to 1")
        for field in ("hidden", "relations"):
            value = getattr(self, field)
            require(0 <= value < math.inf, field, value, "0 (off) or more")
        require(self.relation_heads >= 1, "relation_heads", self.relation_heads, "1 or more")

    def check(self) -> None:
        """Look whether the teacher is there."""
        find(self.teacher)

    def _teacher(self, model: Any) -> Teacher:
        return open_teacher(self.teacher, bare(model).vocabulary, self.dtype)

    def on_model(self, model: Any) -> Any:
        """Return the model, with the maps to the teacher's width besides where hidden states are learned."""
        config = bare(model).config
        if config.loss_chunk:
            raise UserError("config.model.loss_chunk: distillation compares all logits; set it 0")
        head = getattr(bare(model), "head", None)
        if head is not None and not (head.size and head.pooled):
            raise UserError(
                "config.task.name: distillation compares tokens or classes, and this task has neither"
            )
        for field in ("hidden", "relations"):
            if getattr(self, field) and (config.scan or not isinstance(bare(model), Decoder)):
                raise FieldError(field, "it reads the blocks of a decoder that does not scan them; set it 0")
        return Mapped(model, self._teacher(model).model.config.width) if self.hidden else model

    def frozen(self, model: Any, tokeniser: Any, place: Place) -> Any:
        """Return the teacher's weights.

        Raises:
          FieldError: the tokenisers differ, the teacher knows too few positions, or relations cannot be cut.
        """
        teacher = self._teacher(model)
        teacher.check_text(tokeniser, model.length)
        for other in (teacher.model, bare(model)) if self.relations else ():
            self._check_relations(other)
        return teacher.weights(COMPUTE[self.dtype], place)

    def _check_relations(self, model: nn.Module) -> None:
        found = sites(model)
        for name in RELATED:
            site = found.get(f"layer_{model.config.layers - 1}/mixer/{name}/weight")
            if site is None:
                variant = model.config.variants[(model.config.layers - 1) % len(model.config.variants)]
                raise FieldError("relations", f"the last layer, {variant}, has no {name} projection")
            features = math.prod(site.shape[axis] for axis in site.outputs)
            if features % self.relation_heads:
                raise FieldError(
                    "relation_heads",
                    f"{self.relation_heads} does not divide the {features} features of {name}",
                )

    def on_loss(self, loss: Loss) -> Loss:
        """Return the loss mixed with how far the student is from the teacher, over the same targets."""
        inside = bool(self.hidden or self.relations)

        def distilled(
            model: Any, params: Any, batch: Mapping[str, Any], rng: jax.Array | None
        ) -> tuple[jax.Array, jax.Array]:
            student = Recorder(model, inside)
            nats, targets = loss(student, params, {k: v for k, v in batch.items() if k != KEY}, rng)
            (learnt,) = student.calls
            told = Recorder(self._teacher(model).model, inside)
            without_noise = learnt.kwargs | {"deterministic": True, "rngs": None}
            told.apply({"params": batch[KEY]}, *learnt.args, **without_noise)
            far = self._distance(learnt, told.calls[0], params.get(KEY), batch["segment_BT"])
            counts = batch["weights_BT" if far.ndim == 2 else "weights_B"]
            return (1 - self.weight) * nats + jnp.sum(far * counts), targets

        return distilled

    def _distance(self, learnt: Call, told: Call, maps: Any, segment_BT: jax.Array) -> jax.Array:
        """Return how far the student is from the teacher at each token, [B, T], or row, [B]."""
        far = self.weight * of_logits(self.divergence, learnt.logits, told.logits, self.temperature)
        if self.hidden:
            mine, theirs = learnt.blocks(), told.blocks()
            for layer, x_BTD in enumerate(mine):
                target = theirs[math.ceil((layer + 1) * len(theirs) / len(mine)) - 1]
                mapped = jnp.einsum(
                    "BTD,DR->BTR", x_BTD.astype(jnp.float32), maps[f"layer_{layer}"]["weight"]
                )
                far += self.hidden * of_hidden(mapped, target) / len(mine)
        if self.relations:
            for mine, theirs in zip(learnt.related(), told.related()):
                apart = of_relations(mine, theirs, self.relation_heads, segment_BT)
                far += self.relations * apart / len(RELATED)
        return far

    def on_export(self, model: Any, params: Any, calibration: Calibration) -> Any:
        """Return the student's weights alone."""
        return {name: value for name, value in params.items() if name != KEY}
