"""What is published of TPU chips, and the slices that they come in. Nothing here asks a machine.

Sources: the system architecture pages of Cloud TPU, and for links jax-ml.github.io/scaling-book.
"""

from dataclasses import dataclass

from w2s_jax.errors import InputError


@dataclass(frozen=True)
class Chip:
    """One chip, as jax sees it: a device.

    Attributes:
        memory: bytes of HBM.
        operations: bfloat16 multiplications and additions a second.
        bandwidth: bytes a second between HBM and the chip.
        link: bytes a second of one link to a neighbour, in one direction.
        host: chips of one host in a slice of several hosts.
        network: bytes a second between slices, for each chip.
        slices: topologies, the smaller first.
    """

    name: str
    memory: int | float
    operations: float
    bandwidth: float
    link: float
    host: int
    network: float
    slices: tuple[str, ...]


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
)  # fmt: skip
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * 2**30, 275e12, 1228e9, 45e9, 4, 6.25e9, _CUBES),
        Chip("v5e", 16 * 2**30, 197e12, 819e9, 45e9, 4, 3.125e9, _FLAT),
        Chip("v5p", 95 * 2**30, 459e12, 2765e9, 90e9, 4, 6.25e9, _CUBES),
        Chip("v6e", 32 * 2**30, 918e12, 1640e9, 90e9, 4, 12.5e9, _FLAT),
    )
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:4x4"; InputError for a family that is not known."""
    family = topology.partition(":")[0]
    if family not in CHIPS:
        raise InputError(f"topology {topology!r}: no chip {family!r}; one of {', '.join(CHIPS)}")
    return CHIPS[family]


def topologies(family: str) -> list[str]:
    """The slices of a family, the smallest first, as topologies."""
    return [f"{family}:{shape}" for shape in chip_of(family).slices]
