"""Weights for a model from those of another: the same, fewer layers, or cut down to what matters most.

A smaller model made so is structured pruning: an ordinary model of a smaller configuration, which
computes less (Muralidharan et al. 2024, Minitron, 2407.14679, section 2). What matters is read off
activations on training text, as there: of a feed-forward neuron its mean size, of a head the norm of what
it gives to the output projection, of a channel of the residual stream the mean size of what norms give,
summed over layers. Layers are taken at even distances, the last among them (DistilBERT, 1910.01108,
section 3), or those that change the stream most (Men et al. 2024, 2403.03853, eq. 1; the first stays).
Fewer key/value heads with as many query heads are means (Ainslie et al. 2023, GQA, 2305.13245, section 2.1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fastformer.compress.calibrate import Text, letters_of
from fastformer.compress.method import Calibration
from fastformer.compress.record import Recorder
from fastformer.compress.sites import sites
from fastformer.core.errors import FieldError

CUT = "DFHG"  # letters along which a model can be cut
LAYER = re.compile(r"layer_(\d+)/")


class Inherited(NamedTuple):
    """Weights for a model.

    Attributes:
      params: of the model.
      cut: paths of what was cut down. merged: of what has fewer key/value heads.
      fresh: of what the other model does not have, and is as it was.
      layers: of the other model, those that were taken.
    """

    params: Any
    cut: tuple[str, ...]
    merged: tuple[str, ...]
    fresh: tuple[str, ...]
    layers: tuple[int, ...]


def even_layers(taken: int, of: int) -> tuple[int, ...]:
    """Return ``taken`` of the layers, at even distances, the last among them."""
    return tuple(math.ceil((layer + 1) * of / taken) - 1 for layer in range(taken))


def inherit(
    params: Any,
    model: Any,
    other: Any,
    weights: Any,
    letters: Mapping[str, tuple[str, ...]],
    calibration: Calibration,
    by_change: bool = False,
) -> Inherited:
    """Return the weights of ``model`` with those of ``other`` wherever there are such.

    Args:
      params: of the model, as initialised.
      other, weights, letters: the other model, its weights, and by path the letters of their axes.
      calibration: text, read only where something is cut.
      by_change: whether layers are chosen by what they change, and not at even distances.

    Raises:
      FieldError: the other model has fewer layers, or differs in something that cannot be cut.
    """
    mine, theirs = flatten_dict(params, sep="/"), flatten_dict(weights, sep="/")
    taken, of = model.config.layers, other.config.layers
    if taken > of:
        raise FieldError("init", f"it has {of} layers, and this model has {taken}")
    chosen = even_layers(taken, of)
    if by_change and taken < of:
        chosen = layers_by_change(other, weights, calibration, taken)
    source = {path: LAYER.sub(lambda m: f"layer_{chosen[int(m[1])]}/", path) for path in mine}
    found = {path: source[path] for path in mine if source[path] in theirs}
    if not found:
        raise FieldError("init", "it has none of this model's weights")
    merged = {path for path, old in found.items() if "G" in letters[old] and _merges(model, other)}
    for path in merged:
        theirs[found[path]] = _merged(theirs[found[path]], letters[found[path]], _groups(model.config))
    smaller = {path for path, old in found.items() if mine[path].shape != theirs[old].shape}
    scores = importance(other, weights, calibration) if smaller else {}
    new = dict(mine)
    for path, old in found.items():
        new[path] = theirs[old]
        if path in smaller:
            new[path] = _cut(theirs[old], mine[path].shape, letters[old], old, scores)
    fresh = tuple(path for path in mine if path not in found)
    names = (tuple(sorted(some)) for some in (smaller, merged))
    return Inherited(unflatten_dict(new, sep="/"), *names, fresh, chosen)


def _merges(model: Any, other: Any) -> bool:
    """Return whether the model has fewer key/value heads than another with as many query heads."""
    to, of = _groups(model.config), _groups(other.config)
    if model.config.heads != other.config.heads or to >= of:
        return False
    if of % to:
        raise FieldError("init", f"it has {of} key/value heads, and they do not merge into {to} evenly")
    return True


def _groups(config: Any) -> int:
    return config.kv_heads or config.heads


def _merged(x: jax.Array, letters: tuple[str, ...], groups: int) -> jax.Array:
    """Return a weight with its key/value heads merged: neighbours into their mean (2305.13245)."""
    axis = letters.index("G")
    return jnp.mean(x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :]), axis=axis + 1)


def importance(model: Any, weights: Any, calibration: Calibration) -> dict[str, np.ndarray]:
    """Return the importance of channels under "D", and under ``"layer_0/F"`` and so on of what a layer has.

    Heads stand under H, [G, heads of a group].
    """
    known = {path: site for path, site in sites(model).items() if LAYER.match(path)}
    seen = Text(calibration).inputs(model, weights, known)
    scores: dict[str, np.ndarray] = {"D": np.zeros(model.config.width)}
    norms: set[str] = set()  # what several matrices read counts once
    for path, inputs in seen.items():
        layer, letters = path.split("/")[0], letters_of(known[path])[1]
        size = np.asarray(inputs.size[0] / inputs.count)
        branch = path.rsplit("/", 2)[0]
        if letters == "D" and branch not in norms:
            norms.add(branch)
            scores["D"] += size
        elif letters == "F":
            scores[f"{layer}/F"] = size
        elif letters == "HP":
            heads = known[path].shape[known[path].letters.index("H")]
            power = np.asarray(jnp.diagonal(inputs.gram[0])).reshape(heads, -1).sum(1)
            groups = model.config.kv_heads or model.config.heads
            scores[f"{layer}/H"] = power.reshape(groups, -1)
    return scores


def layers_by_change(model: Any, weights: Any, calibration: Calibration, taken: int) -> tuple[int, ...]:
    """Return the layers whose outputs differ most in direction from their inputs, the first among them."""

    @jax.jit
    def change(weights: Any, batch: Any) -> jax.Array:
        recorder = Recorder(model, True)
        calibration.loss(recorder, weights, batch, None)
        stream = [x.astype(jnp.float32) for x in recorder.calls[0].blocks()]
        real = batch["segment_BT"] > 0
        cosines = [
            jnp.sum(x * y, -1) / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1))
            for x, y in zip(stream, stream[1:])
        ]
        return jnp.stack([jnp.sum(jnp.where(real, 1 - cosine, 0)) for cosine in cosines])

    total = sum(np.asarray(change(weights, batch)) for batch in calibration.batches())
    kept = np.argsort(-total, kind="stable")[: taken - 1] + 1
    return (0, *sorted(int(layer) for layer in kept))


def _cut(
    x: jax.Array,
    shape: tuple[int, ...],
    letters: tuple[str, ...],
    path: str,
    scores: Mapping[str, np.ndarray],
) -> jax.Array:
    """Return the part of a weight that matters most."""
    layer = path.split("/")[0]
    for axis, (letter, size) in enumerate(zip(letters, shape)):
        if x.shape[axis] == size:
            continue
        # Groups go with their heads where each head has its own.
        name = "D" if letter == "D" else f"{layer}/{'H' if letter == 'G' else letter}"
        if letter not in CUT or size > x.shape[axis] or name not in scores:
            raise FieldError(
                "init",
                f"{path} has {x.shape[axis]} {letter} and this model {size}; "
                "only D, F and H of a larger model are cut",
            )
        x = jnp.take(x, jnp.asarray(_best(scores[name], size, letter, path)), axis)
    return x


def _best(score: np.ndarray, size: int, letter: str, path: str) -> np.ndarray:
    if letter in "HG" and score.shape[1] > 1:  # as many heads of every group; groups themselves stay
        groups, per_group = score.shape
        if letter == "G" or size % groups:
            raise FieldError("init", f"{path}: grouped heads are cut within their groups; keep kv_heads")
        best = np.sort(np.argsort(-score, axis=1, kind="stable")[:, : size // groups], axis=1)
        return (best + per_group * np.arange(groups)[:, None]).ravel()
    return np.sort(np.argsort(-score.ravel(), kind="stable")[:size])
