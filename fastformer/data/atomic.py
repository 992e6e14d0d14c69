"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastformer.core.errors import UserError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of ``path`` when the block ends well, and vanishes otherwise."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep a cache from others who may read the folder
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def make_directory(path: Path, field: str) -> Path:
    """Make ``path`` and its parents, and return it.

    Raises:
      UserError: it cannot be made or written; the line names ``field``.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # the latter of a NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{field}: cannot make {str(path)!r}: {reason}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{field}: {path} cannot be written; set {field} or $FASTFORMER_DATA")
    return path
