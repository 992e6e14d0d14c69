"""Floor 5: tasks, each what a batch, a loss and a metric are."""

from __future__ import annotations

from ml_collections import ConfigDict

from fastformer.core.config import section
from fastformer.core.errors import lookup
from fastformer.tasks.text import Text

__all__ = ["TASKS", "Text", "build"]

TASKS: dict[str, type] = {"text": Text}


def build(config: ConfigDict) -> Text:
    """Return the task that the section ``task`` of a configuration names.

    Raises:
      UserError: there is no such task, or it has no such key.
    """
    return section(lookup(TASKS, config.task.name, "config.task.name"), config, "task")
