"""What a training step would take at best, from published figures: an estimate, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A chip as published (Google Cloud's TPU pages; Austin et al. 2025, How to Scale Your Model, part 2).

    Attributes:
      flops: bfloat16, a second.
      hbm: bytes of memory.
      hbm_speed: bytes a second.
      link_speed: bytes a second over one link, one way.
      far_speed: bytes a second to other slices, over the data centre's network; published of v5e and v6e
        (6.4 and 25.6 Tbit/s a pod of 256), 50 Gbit/s taken for the others.
      devices: that JAX sees of one chip.
    """

    flops: float
    hbm: float
    hbm_speed: float
    link_speed: float
    far_speed: float = 6.25e9
    devices: int = 1

    def of_device(self, name: str) -> float:
        """Return a field's share of one device."""
        return getattr(self, name) / self.devices


GIB = 2.0**30
CHIPS: dict[str, Chip] = {
    "v4": Chip(2.75e14, 32 * GIB, 1.2e12, 4.5e10, devices=2),
    "v5e": Chip(1.97e14, 16 * GIB, 8.1e11, 4.5e10, 3.1e9),
    "v5p": Chip(4.59e14, 95 * GIB, 2.8e12, 9e10),
    "v6e": Chip(9.2e14, 32 * GIB, 1.6e12, 9e10, 1.25e10),
}


@dataclass(frozen=True)
class Estimate:
    """Seconds that a step needs for each of its parts, one device's share.

    Attributes:
      compute: products at the chip's peak.
      memory: arguments and results once, temporaries written and read.
      links, far: collectives over one ring of the slice, both ways at once; between slices.
      useful: what the products of forward and backward pass alone would need, nothing computed again.
    """

    compute: float
    memory: float
    links: float
    far: float
    useful: float

    @property
    def best(self) -> float:
        """Return the seconds of a step whose parts all overlap."""
        return max(self.compute, self.memory, self.links, self.far)

    @property
    def worst(self) -> float:
        """Return the seconds of a step none of whose parts overlap, each at its best."""
        return self.compute + self.memory + self.links + self.far

    @property
    def bound(self) -> str:
        """Return what takes longest."""
        parts = ("compute", "memory", "links", "far")
        return max(parts, key=lambda name: getattr(self, name))


def estimate(chip: Chip, flops: float, useful: float, moved: float, near: float, far: float) -> Estimate:
    """Return what the chip would need.

    Args:
      flops: of one device's share of the step, and ``useful`` of those.
      moved: bytes to and from its memory.
      near, far: bytes that it sends within its slice, and to others.
    """
    peak = chip.of_device("flops")
    return Estimate(
        compute=flops / peak,
        memory=moved / chip.of_device("hbm_speed"),
        links=near / (2 * chip.link_speed / chip.devices),
        far=far / chip.of_device("far_speed"),
        useful=useful / peak,
    )
