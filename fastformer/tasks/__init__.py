"""Floor 5: tasks. A task is one file and one row below: what a batch, a loss, a metric and its data are."""

from __future__ import annotations

from ml_collections import ConfigDict

from fastformer.core.config import section
from fastformer.core.errors import lookup
from fastformer.tasks.answer import Answer
from fastformer.tasks.code import Code
from fastformer.tasks.copy import Copy
from fastformer.tasks.digits import Digits
from fastformer.tasks.induction import Induction
from fastformer.tasks.listops import ListOps
from fastformer.tasks.mlm import MLM
from fastformer.tasks.qa import QA
from fastformer.tasks.recall import Recall
from fastformer.tasks.reviews import Reviews
from fastformer.tasks.similarity import Similarity
from fastformer.tasks.task import Task, check_fits, check_tokens
from fastformer.tasks.text import Text
from fastformer.tasks.translate import Translate

__all__ = ["TASKS", "Task", "build", "check_tokens"]

TASKS: dict[str, type[Task]] = {
    "text": Text,
    "code": Code,
    "mlm": MLM,
    "recall": Recall,
    "copy": Copy,
    "induction": Induction,
    "listops": ListOps,
    "digits": Digits,
    "reviews": Reviews,
    "translate": Translate,
    "qa": QA,
    "answer": Answer,
    "similarity": Similarity,
}


def build(config: ConfigDict) -> Task:
    """Return the task that the section ``task`` of a configuration names.

    Raises:
      UserError: there is no such task, it has no such key, or the model or the source is not of its kind.
    """
    task = section(lookup(TASKS, config.task.get("name"), "config.task.name"), config, "task")
    check_fits(task, config)
    return task
