"""The user's mistakes, each said in one line."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable
from typing import Any, TypeVar

Value = TypeVar("Value")

TOO_LARGE = (
    "out of memory; lower config.train.batch or config.data.length, or raise config.train.accumulate; "
    "config.model.remat=full keeps less"
)
FULL = errno.ENOSPC, errno.EDQUOT
BROKEN = errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM
# What reading raises where a text is no JSON, or JSON of another shape.
MALFORMED = ValueError, LookupError, TypeError, AttributeError, RecursionError
GOES_ON = "the same command then goes on from the last checkpoint"


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, without a traceback, exit code 2."""


class FieldError(UserError):
    """A bad value of one field; whoever knows the field's section puts its path in front."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field, self.message = field, message


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` for the closest of ``names``, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def lookup(table: dict[str, Value], name: str, field: str) -> Value:
    """Return ``table[name]``.

    Raises:
      FieldError: ``name`` is not in the table; the line lists what is and the nearest name.
    """
    if name not in [*table]:  # a list, for what a name is mistaken for may have no hash
        allowed = ", ".join(table)
        raise FieldError(field, f"{name!r} is unknown{nearest(str(name), table)} (allowed: {allowed})")
    return table[name]


def require(ok: bool, field: str, value: Any, allowed: str) -> None:
    """Raise a FieldError unless ``ok``; ``allowed`` says in words which values are."""
    if not ok:
        raise FieldError(field, f"{value!r} is not allowed; it must be {allowed}")


def explain(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the line that an error costs; None where a traceback is of more use.

    2 is the user's mistake, to be mended before the same command goes on; 1 is not.
    """
    if isinstance(error, UserError):
        return 2, " ".join(str(error).splitlines())
    reason = " ".join(str(error).split())
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    # What is under orbax has errors of its own, with the system's words in them.
    if number in FULL or any(os.strerror(code) in reason for code in FULL):
        return 1, f"the disk is full; make room, and {GOES_ON} ({reason[:200]})"
    if number in BROKEN:
        return 1, f"a file cannot be read or written; mend that, and {GOES_ON} ({reason[:200]})"
    if isinstance(error, RuntimeError) and reason.startswith("Unable to initialize backend"):
        return 2, f"JAX: {reason[:300]}; $JAX_PLATFORMS names what there is (cpu, cuda, tpu), or is empty"
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in reason:
        return 2, f"{TOO_LARGE} ({reason[:200] or 'MemoryError'})"
    return None
