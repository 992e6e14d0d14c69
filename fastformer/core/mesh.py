"""The device mesh, and the letters that are split over its axes."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from fastformer.core.alphabet import LETTERS
from fastformer.core.errors import FieldError, UserError, lookup, require
from fastformer.core.values import check_kind


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 is all that remain (at most one axis)."""

    data: int
    fsdp: int
    tensor: int
    sequence: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size >= 1 or size == -1, name, size, "a number of devices, or -1 for all that remain")
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise FieldError(free[1], "only one axis may be -1")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Return the mesh with axes data, fsdp, tensor and sequence over ``devices`` (default: all).

    Over several slices of TPUs, copies along data lie in different slices: only their gradients go
    over the data centre's network.

    Raises:
      UserError: the axes do not multiply to a number of devices that is there.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values():
        left = max(1, len(devices) // fixed)
        sizes = {name: left if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"config.mesh: {asked} is not the {len(devices)} devices that are here")
    # Explicit axes, the default of make_mesh, are not supported by linen's logical axes.
    axis_types, slices = (AxisType.Auto,) * len(sizes), _slices(devices)
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types, devices=devices)
    if sizes["data"] % slices:
        raise UserError(
            f"config.mesh.data: {sizes['data']} is no multiple of the {slices} slices that are here; between "
            "slices only copies of the model are kept alike, for the network there is slow"
        )
    near, far = (sizes["data"] // slices, *list(sizes.values())[1:]), (slices, *(1,) * (len(sizes) - 1))
    return Mesh(mesh_utils.create_hybrid_device_mesh(near, far, devices), tuple(sizes), axis_types)


def _slices(devices: list[jax.Device]) -> int:
    """Return the number of TPU slices that the devices lie in; 1 where there are none."""
    return len({getattr(device, "slice_index", None) for device in devices})


def rules(sharding: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return flax's logical axis rules from the config's letters; the first rule wins an axis.

    They stand in the order of the alphabet, which a configuration read from JSON has lost: activations are
    split by rows and time first, and what those take of the mesh is not there for the width.

    Raises:
      UserError: a key that is no letter, or a mesh axis that does not exist.
    """
    known = dict.fromkeys(field.name for field in dataclasses.fields(MeshConfig))
    for letter, axes in sharding.items():
        lookup(LETTERS, letter, "config.sharding")
        check_kind(axes, "tuple[str, ...]", f"config.sharding.{letter}")
        allowed = f"axes of the mesh, each once ({', '.join(known)})"
        require(len({*axes}) == len(axes), f"config.sharding.{letter}", axes, allowed)
        for axis in axes:
            lookup(known, axis, f"config.sharding.{letter}")
    return tuple((letter, tuple(sharding[letter])) for letter in LETTERS if letter in sharding)


_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


def platform() -> str:
    """Return what the program is made for, "cpu", "gpu" or "tpu": the mesh's devices, there or not."""
    mesh = _MESH.get()
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def layout(letters: str, shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    """Return the mesh axes that each axis of an array is split over by its letter; () where it is whole.

    It is whole without a mesh, over one device, and where its size does not split evenly; a "." is whole.
    """
    mesh = _MESH.get()
    if mesh is None:
        return ((),) * len(letters)
    found = nn.logical_to_mesh_axes(tuple(None if letter == "." else letter for letter in letters))
    axes = [(one,) if isinstance(one, str) else tuple(one or ()) for one in found]
    even = (1 < shards(one) and size % shards(one) == 0 for one, size in zip(axes, shape, strict=True))
    return tuple(one if good else () for one, good in zip(axes, even))


def shards(axes: tuple[str, ...]) -> int:
    """Return the number of devices along axes of the mesh in use."""
    return math.prod(_MESH.get().shape[axis] for axis in axes)


@contextlib.contextmanager
def use(mesh: Mesh, axis_rules: tuple[tuple[str, tuple[str, ...]], ...]) -> Iterator[None]:
    """Within it, ``constrain`` and logical parameter axes mean this mesh.

    It must be jax.set_mesh: under the older ``with mesh:`` flax's constraints do nothing.
    """
    token = _MESH.set(mesh)
    try:
        with jax.set_mesh(mesh), nn.logical_axis_rules(axis_rules):
            yield
    finally:
        _MESH.reset(token)


def shardings(boxed: Any, mesh: Mesh, axis_rules: tuple[tuple[str, tuple[str, ...]], ...]) -> Any:
    """Return the NamedShardings of a tree whose leaves carry their letters (nn.Partitioned)."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, axis_rules)


def check_divisible(sizes: Mapping[str, tuple[str, int]], mesh: Mesh, axis_rules: Any) -> None:
    """Check that every size splits evenly over its mesh axes.

    Args:
      sizes: letter -> (config key, size).

    Raises:
      UserError: one does not.
    """
    for letter, axes in axis_rules:
        key, size = sizes.get(letter, ("", 0))
        shards = math.prod(mesh.shape[axis] for axis in axes)
        if size % shards:
            raise UserError(
                f"config.{key}: {size} does not split over the {shards} devices of {' x '.join(axes)}"
            )


def batch_sharding(mesh: Mesh, axis_rules: Any) -> NamedSharding:
    """Return the sharding of an array whose first axis is B and whose others are whole."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(("B",), axis_rules))
