"""Linearisation: a trained softmax model becomes one of another attention, with its weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from fastformer.compress import transfer
from fastformer.compress.adapters import KEY, Adapted, adapted
from fastformer.compress.method import Calibration, Loss, Method, Place, bare, within
from fastformer.compress.sites import sites
from fastformer.compress.teacher import Teacher, find, open_teacher
from fastformer.core.dtypes import COMPUTE
from fastformer.core.errors import FieldError, UserError, lookup, require
from fastformer.core.seq import Seq, whole
from fastformer.models import Decoder
from fastformer.models.config import ModelConfig

# Letters of the projections that a softmax has, and whoever takes its place must have too.
PROJECTIONS = {"query": "DHK", "key": "DGK", "value": "DGK", "out": "HKD"}
# What a student may have otherwise than its teacher.
FREE = (
    "attention", "pattern", "kv_heads", "dtype", "implementation", "remat", "scan", "loss_chunk", "dropout",
)  # fmt: skip
SIZES = {"ff_width": "hidden", "head_width": "key_width"}  # 0 stands for a size that these know


class TunedState(NamedTuple):
    """What the optimiser keeps.

    Attributes:
      made: int32, updates. inner: the state of the optimiser within, of what is ever trained alone.
    """

    made: jax.Array
    inner: Any


@dataclass(frozen=True)
class Linearise(Method):
    """Begin with a softmax model's weights; teach new parameters its attention, then tune to the loss.

    LoLCATs (Zhang et al. 2024, 2410.10254): for ``transfer`` updates parameters that the teacher does not
    have (feature maps, gates, mixing) learn to put out what its attention does, layer by layer, each given
    what the teacher's layer reads; all others stand still. From then on low-rank adapters of the queries',
    keys', values' and output projections learn the task, and all others stand still.

    Attributes:
      teacher: workdir of a finished run of the same sizes; key/value heads may be fewer here.
      transfer: updates of attention transfer; 0 is none.
      rank: of the adapters; 0 is none of them, and then all weights learn the task.
      alpha: their products count alpha / rank times.
      dtype: of the teacher.

    Raises:
      FieldError: a value that cannot be.
    """

    teacher: str
    transfer: int
    rank: int
    alpha: float
    dtype: str

    def __post_init__(self) -> None:
        for field in ("transfer", "rank"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        require(0 < self.alpha < math.inf, "alpha", self.alpha, "above 0 and finite")
        lookup(COMPUTE, self.dtype, "dtype")

    @property
    def begins_with(self) -> str:
        """Return the field with the workdir whose weights the run begins with."""
        return "teacher"

    def check(self) -> None:
        """Look whether the teacher is there."""
        find(self.teacher)

    def on_model(self, model: Any) -> Adapted:
        """Return the model with adapters of its projections.

        Raises:
          UserError: it is no decoder, scans its layers, or has a mixer without a softmax's projections.
        """
        module = bare(model)
        if not isinstance(module, Decoder):
            raise UserError(f"config.model.name: linearise makes decoders, no {module.config.name}")
        if module.config.scan:
            raise UserError("config.model.scan: linearise goes layer by layer; set it False")
        found = sites(model)
        wanted = {
            f"layer_{layer}/mixer/{name}/weight": letters
            for layer in range(module.config.layers)
            for name, letters in PROJECTIONS.items()
        }
        for path, letters in wanted.items():
            _check_projection(module.config, path, letters, found)
        chosen = tuple(found[path] for path in wanted) if self.rank else ()
        return Adapted(model, chosen, self.rank, self.alpha / max(self.rank, 1))

    def frozen(self, model: Any, tokeniser: Any, place: Place) -> Any:
        """Return the teacher's weights, where there is a transfer.

        Raises:
          FieldError: tokenisers or sizes differ, or there is nothing to transfer to.
        """
        teacher = self._teacher(model)
        teacher.check_text(tokeniser, model.length)
        _check_sizes(teacher.model.config, bare(model).config, self.teacher)
        if not self.transfer:
            return None
        if not self._new(model):
            names = " and ".join(dict.fromkeys(bare(model).config.variants))
            raise FieldError(
                "transfer",
                f"{self.transfer} updates would train nothing, for {names} has no parameters that the "
                "teacher does not have; set it 0",
            )
        return teacher.weights(COMPUTE[self.dtype], place)

    def on_loss(self, loss: Loss) -> Loss:
        """Return the loss of the transfer while it lasts, and then ``loss``."""

        def linearised(
            model: Any, params: Any, batch: Mapping[str, Any], rng: jax.Array | None
        ) -> tuple[jax.Array, jax.Array]:
            rest = {name: value for name, value in batch.items() if name != KEY}

            def tune(params: Any) -> tuple[jax.Array, jax.Array]:
                still = params if not self.rank else _still(params, lambda path: not path.startswith(KEY))
                nats, targets = loss(model, still, rest, rng)
                return nats.astype(jnp.float32), targets.astype(jnp.float32)

            def learn(params: Any) -> tuple[jax.Array, jax.Array]:
                told = transfer.of_teacher(self._teacher(model).model, batch[KEY], rest)
                known = flatten_dict(batch[KEY], sep="/")
                seq = Seq(rest["segment_BT"], rest["position_BT"])
                far_BT = transfer.error(model, _still(params, lambda path: path in known), told, seq)
                real_BT = (seq.segment_BT > 0).astype(jnp.float32)
                return jnp.sum(far_BT * real_BT), jnp.sum(real_BT)

            if not self.transfer:
                return tune(params)
            return jax.lax.cond(adapted(model).step < self.transfer, learn, tune, params)

        return linearised

    def on_optimiser(self, tx: optax.GradientTransformation, model: Any) -> optax.GradientTransformation:
        """Return the optimiser of what is trained: new parameters first, then adapters, or all weights."""
        new = self._new(model)

        def later(path: str) -> bool:
            return path.startswith(f"{KEY}/") if self.rank else True

        def trained(tree: Any) -> Any:
            flat = flatten_dict(tree, sep="/")
            kept = {path: x for path, x in flat.items() if later(path) or self.transfer and path in new}
            return unflatten_dict(kept, sep="/")

        def init(params: Any) -> TunedState:
            return TunedState(jnp.zeros((), jnp.int32), tx.init(trained(params)))

        def update(gradients: Any, state: TunedState, params: Any) -> tuple[Any, TunedState]:
            found, inner = tx.update(trained(gradients), state.inner, trained(params))
            first, found = state.made < self.transfer, flatten_dict(found, sep="/")

            def one(path: str, like: jax.Array) -> jax.Array:
                if path not in found:
                    return jnp.zeros_like(like)
                return jnp.where(jnp.where(first, path in new, later(path)), found[path], 0.0)

            flat = {path: one(path, x) for path, x in flatten_dict(gradients, sep="/").items()}
            return unflatten_dict(flat, sep="/"), TunedState(state.made + 1, inner)

        return optax.GradientTransformation(init, update)

    def on_export(self, model: Any, params: Any, calibration: Calibration) -> Any:
        """Return the weights with their adapters merged into them."""
        return adapted(model).merged(params)

    def apart(self, model: Any) -> dict[str, Any]:
        """Return the model with each branch of its hybrid mixers alone (2510.05901)."""
        config = bare(model).config
        mixers = [config.mixer(layer, detached=True) for layer in range(len(config.variants))]
        names = dict.fromkeys(name for mixer in mixers for name in mixer.branches)
        return {f"{name}_alone": within(model, lambda x, name=name: _alone(x, name)) for name in names}

    def _teacher(self, model: Any) -> Teacher:
        return open_teacher(self.teacher, bare(model).vocabulary, self.dtype)

    def _new(self, model: Any) -> frozenset[str]:
        """Return the paths of parameters that the teacher does not have."""
        module = bare(model)
        tokens, seq = jnp.zeros((1, 2), jnp.int32), whole(1, 2)
        mine = jax.eval_shape(lambda: nn.unbox(module.init(jax.random.key(0), tokens, seq)["params"]))
        return frozenset(flatten_dict(mine, sep="/")) - frozenset(self._teacher(model).letters())


def _still(params: Any, which: Any) -> Any:
    """Return the weights, of which those at paths that ``which`` says have no gradient."""
    flat = flatten_dict(params, sep="/")
    held = {path: jax.lax.stop_gradient(x) if which(path) else x for path, x in flat.items()}
    return unflatten_dict(held, sep="/")


def _alone(module: nn.Module, branch: str) -> nn.Module:
    attention = {**module.config.attention, "branch": branch}
    return module.clone(config=dataclasses.replace(module.config, attention=attention))


def _check_projection(config: ModelConfig, path: str, letters: str, found: Mapping[str, Any]) -> None:
    layer, name = int(path.split("/")[0].removeprefix("layer_")), path.split("/")[2]
    variant = config.variants[layer % len(config.variants)]
    field = "config.model.pattern" if config.pattern else "config.model.attention.name"
    groups = config.kv_heads or config.heads
    sizes = {"D": config.width, "H": config.heads, "G": groups, "K": config.key_width}
    wanted = tuple(sizes[letter] for letter in letters)
    if path not in found:
        raise UserError(f"{field}: {variant} has no {name} projection, and cannot take the place of softmax")
    if found[path].shape != wanted:
        raise UserError(
            f"{field}: the {name} projection of {variant} has shape {found[path].shape}; that of softmax, "
            f"whose place it is to take, is {wanted}"
        )


def _check_sizes(theirs: ModelConfig, mine: ModelConfig, workdir: str) -> None:
    for field in vars(mine):
        known = SIZES.get(field, field)
        if field not in FREE and getattr(theirs, known) != getattr(mine, known):
            raise FieldError(
                "teacher",
                f"{workdir} has config.model.{field} {getattr(theirs, known)!r}, and this run "
                f"{getattr(mine, known)!r}; a linearised model has all but its attention of its teacher",
            )
