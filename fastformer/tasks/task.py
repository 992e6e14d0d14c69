"""What every task says: what a batch, its loss, its metrics, its data and its models are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from fastformer.core.errors import FieldError, UserError, nearest
from fastformer.core.seq import Seq
from fastformer.data import DataConfig
from fastformer.data.sources import check_kind
from fastformer.models import Head

Batch = Mapping[str, jax.Array]
Sums = dict[str, jax.Array]
# From prompts to what a model makes of each, in tokens without the end; how is not the task's to know.
Complete = Callable[[Sequence[Sequence[int]]], list[list[int]]]


@dataclass(frozen=True)
class Task:
    """A subclass is a task: it says what stands here, and is a row of TASKS. Its fields are config.task.

    Attributes:
      name: of its row.
    """

    kind: ClassVar[str] = "text"  # of what its sources hold, as in data.sources.SOURCES
    models: ClassVar[tuple[str, ...]] = ("decoder",)  # rows of models.MODELS that it can train
    metric: ClassVar[str]  # of its quality, what the best checkpoint is best in
    higher: ClassVar[bool] = False  # a higher metric is better
    chunked: ClassVar[bool] = False  # its loss goes by config.model.loss_chunk
    lossy: ClassVar[bool] = False  # tokens may lose some of the text: it counts no bytes and cuts none out
    sources: ClassVar[bool] = False  # its rows tell what is read from what is written after it
    asks: ClassVar[tuple[str, ...]] = ()  # flags of --mode=generate that it answers, all of them needed

    name: str

    @property
    def head(self) -> Head | None:
        """Return what its model ends in; None is the logits of the next token."""
        return None

    def open(self, data: DataConfig, workdir: Path | None, config: ConfigDict) -> Any:
        """Return the data: two splits, as data.TextData and data.Examples have them.

        Args:
          data: the section config.data.
          config: the whole configuration.

        Raises:
          UserError: it cannot be had.
        """
        raise NotImplementedError

    def loss(
        self, model: nn.Module, params: Any, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return ``(nats, targets)``: the summed cross-entropy and how many targets counted, float32.

        Args:
          rng: key of dropout; None is without.
        """
        raise NotImplementedError

    def totals(self, model: nn.Module, params: Any, batch: Batch) -> Sums:
        """Return float32 sums over a held-out batch: ``nats``, ``targets`` and what ``quality`` needs.

        An array is not summed but kept, a row of it for each row of the batch.
        """
        nats, targets = self.loss(model, params, batch)
        return {"nats": nats, "targets": targets}

    def quality(self, sums: Mapping[str, float], data: Any, limit: int, overlap: int) -> dict[str, float]:
        """Return the metrics of the totals of the first ``limit`` held-out rows (0: all)."""
        raise NotImplementedError

    def decoded(self, complete: Complete, data: Any, limit: int) -> dict[str, float]:
        """Return the metrics of what a model generates for the first ``limit`` held-out rows (0: all)."""
        return {}

    def samples(self, complete: Complete, data: Any, prompt: str) -> list[str]:
        """Return a few outputs to show in the report."""
        return []

    def signatures(self, data: Any) -> dict[str, str]:
        """Return, of metrics that have several versions, which one was measured."""
        return {}

    def check_asked(self, asked: Mapping[str, Sequence[str]]) -> None:
        """Check that ``--mode=generate`` can be answered.

        Args:
          asked: by flag, what the user gave.

        Raises:
          UserError: the task generates nothing, or takes other flags.
        """
        if not self.asks:
            raise UserError(f"--mode=generate: the task {self.name} generates nothing")
        for flag in asked:
            if flag not in self.asks:
                takes = " and ".join(f"--{name}" for name in self.asks)
                raise UserError(f"--{flag}: the task {self.name} takes {takes}")
        for flag in self.asks:
            if flag not in asked:
                raise UserError(f"--{flag}: the task {self.name} needs it")

    def respond(
        self,
        complete: Complete,
        tokeniser: Any,
        asked: Mapping[str, Sequence[str]],
        model: nn.Module,
        params: Any,
    ) -> list[str]:
        """Return what ``--mode=generate`` prints, one text for each thing asked."""
        raise NotImplementedError


def check_fits(task: Task, config: ConfigDict) -> None:
    """Check that the source and the model of a configuration are of a kind that the task can use.

    Raises:
      UserError: one is not; the line names those that are.
    """
    if config.model.name not in task.models:
        raise FieldError(
            "config.model.name",
            f"the task {task.name} trains no {config.model.name}{nearest(config.model.name, task.models)} "
            f"(allowed: {', '.join(task.models)})",
        )
    if config.model.loss_chunk and not task.chunked:
        raise FieldError("config.model.loss_chunk", f"the loss of {task.name} wants all logits; set it 0")
    if config.model.get("prefix_lm") and not task.sources:
        from fastformer.tasks import TASKS  # the table imports the tasks, which import this file

        others = ", ".join(name for name, row in TASKS.items() if row.sources)
        raise FieldError(
            "config.model.prefix_lm",
            f"the task {task.name} has no sources (tasks that have: {others}); set it False",
        )
    check_kind(config.data.source, task.kind)


def check_tokens(task: Task, tokeniser: Any) -> None:
    """Check that a task can do with what the tokens keep of the text.

    Raises:
      UserError: it cannot.
    """
    if tokeniser is not None and not tokeniser.lossless and not task.lossy:
        raise UserError(
            f"config.data.tokeniser: the task {task.name} needs the text back as it was, and word pieces "
            "lose case and spaces; mlm, similarity and reviews can do with them"
        )


def apply(model: nn.Module, params: Any, batch: Batch, rng: jax.Array | None, **inputs: Any) -> jax.Array:
    """Return what a model makes of a batch, with dropout where there is a key for it."""
    seq = Seq(batch["segment_BT"], batch["position_BT"], batch.get("last_BT"))
    rngs = None if rng is None else {"dropout": rng}
    options = {"deterministic": rng is None, "rngs": rngs, **inputs}
    return model.apply({"params": params}, batch["tokens_BT"], seq, **options)[0]
