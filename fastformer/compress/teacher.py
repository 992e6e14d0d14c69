"""A teacher: a finished run of ours, its model and its stored weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from fastformer import models, tasks
from fastformer.compress import store
from fastformer.compress.method import Place
from fastformer.compress.numerics import dequantise, is_stored, replace_leaves
from fastformer.core import config as configuration
from fastformer.core.errors import FieldError
from fastformer.core.seq import whole
from fastformer.data import load_tokeniser
from fastformer.data.tokenisers import FILE as TOKENISER
from fastformer.models.stack import unstack


@dataclass(frozen=True)
class Teacher:
    """A finished run.

    Attributes:
      workdir: of the run. config: that it began with.
      model: the linen module. tokeniser: of its text; none for a task without text.
    """

    workdir: Path
    config: ConfigDict
    model: nn.Module
    tokeniser: Any

    def weights(self, dtype: jnp.dtype, place: Place) -> Any:
        """Return the stored weights on the mesh, integers as floats, matrices in ``dtype``.

        Raises:
          UserError: they cannot be read, or are of another model.
        """
        path = self.workdir / store.WEIGHTS

        def whole_array(_: str, leaf: Any) -> jax.Array:
            return dequantise(leaf) if is_stored(leaf) else jnp.asarray(leaf)

        params = unstack(replace_leaves(store.tree(store.load(path)), whole_array))

        store.check_fits(params, jax.eval_shape(lambda: nn.unbox(self._init())), str(path))
        letters = self.letters()

        def one(path: str, x: jax.Array) -> jax.Array:
            return place(x.astype(dtype) if x.ndim > 1 else x, letters[path])

        return replace_leaves(params, one)

    def letters(self) -> dict[str, tuple[str, ...]]:
        """Return the letters of the axes of every weight, by path."""
        return {path: tuple(x) for path, x in flatten_dict(self._boxed(), sep="/").items()}

    def _boxed(self) -> Any:
        return nn.get_partition_spec(jax.eval_shape(self._init))

    def _init(self) -> Any:
        return self.model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), whole(1, 2))["params"]

    def check_text(self, tokeniser: Any, length: int) -> None:
        """Check that it reads the tokens and the positions of rows of ``length`` tokens.

        Raises:
          FieldError: it does not.
        """
        prints = [x and x.fingerprint for x in (self.tokeniser, tokeniser)]
        if prints[0] != prints[1]:
            raise FieldError("teacher", f"{self.workdir} has another tokeniser than this run")
        most = self.model.length
        if self.model.config.positions == "learned" and length > most:
            raise FieldError(
                "teacher", f"{self.workdir} has learned {most} positions, and rows have {length}"
            )


def find(workdir: str) -> ConfigDict:
    """Return the configuration of the finished run in ``workdir``.

    Raises:
      FieldError: there is no finished run.
    """
    folder = Path(workdir)
    if not workdir:
        raise FieldError("teacher", "'' is not allowed; it must be the workdir of a finished run")
    for name in (configuration.CONFIG, store.WEIGHTS):
        if not (folder / name).is_file():
            reason = "it is a file" if folder.is_file() else "there is no such folder"
            reason = "train it to its end first" if folder.is_dir() else reason
            raise FieldError("teacher", f"{workdir} holds no {name}; {reason}")
    try:
        return configuration.from_json((folder / configuration.CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise FieldError("teacher", f"the {configuration.CONFIG} of {workdir} cannot be read") from error


def open_teacher(workdir: str, vocabulary: int, dtype: str) -> Teacher:
    """Return the teacher in ``workdir``, computing in ``dtype``; its weights are not read yet.

    Args:
      workdir: of the teacher. vocabulary: of the student, which is the teacher's too.
      dtype: a row of COMPUTE.

    Raises:
      FieldError: there is no finished run.
    """
    config, folder = find(workdir), Path(workdir)
    tokeniser = load_tokeniser(folder) if (folder / TOKENISER).exists() else None
    model = models.build(config, vocabulary, config.data.length, tasks.build(config).head)
    model = model.clone(config=dataclasses.replace(model.config, dtype=dtype, dropout=0.0, scan=False))
    return Teacher(folder, config, model, tokeniser)
