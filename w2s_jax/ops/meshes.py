"""The mesh that a run uses: named, chosen for it, or all devices of several hosts.

What a spec such as "data=2,tensor=4" means is in `sharding.py`. Commands declare `--mesh` by what
is here, so no jax is imported before a mesh is made.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from w2s_jax.distributed import own_number, started
from w2s_jax.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

AUTO = "auto"
"""The mesh that a command chooses itself."""
OVER_HOSTS = "data=-1"
"""The mesh of several hosts where none is asked for."""


class ChosenMesh(Protocol):
    """A mesh that was chosen for what is to run, as `plan.meshes.choose_mesh` returns it."""

    @property
    def mesh(self) -> "Mesh | None":
        """The mesh; None of one device."""

    @property
    def name(self) -> str:
        """The mesh and the devices in words."""

    @property
    def told(self) -> str:
        """The choice in a line."""


def mesh_of(
    spec: str | None,
    choose: Callable[[], ChosenMesh] | None = None,
    *,
    before: Callable[[], str | None] = lambda: None,
) -> "Mesh | None":
    """The mesh of --mesh; without the flag none on one host, and data=-1 on several.

    What is used without the flag is told on stderr, where it is not all there is, and so is what is
    chosen for "auto".

    Args:
        spec: The flag's value.
        choose: Picks the mesh for "auto"; None where a command needs its mesh named.
        before: The name of the mesh that this run had when it was stopped.

    Raises:
        InputError: As `make_mesh` and `choose` do, for "auto" without `choose`, and where hosts
            were given different specs.
    """
    import jax

    from w2s_jax.distributed import agree
    from w2s_jax.ops.sharding import make_mesh

    agree("command", {"--mesh": spec})
    if spec == AUTO and choose is not None:
        chosen = choose()
        had = before()
        other = "" if had in (None, chosen.name) else f"; the run before had {had}"
        sys.stderr.write(f"{chosen.told}{other}\n")
        return chosen.mesh
    if spec is not None:
        return named_mesh(spec)
    if not started():
        if jax.device_count() > 1:
            told = f"one of the {jax.device_count()} devices here is used"
            sys.stderr.write(f"{told}; --mesh {OVER_HOSTS}, say, uses all\n")
        return None
    mesh = make_mesh(OVER_HOSTS)
    told = f"{own_number()[1]} hosts with {mesh.size} devices: --mesh {OVER_HOSTS}"
    sys.stderr.write(f"{told}, as none is given\n")
    return mesh


def named_mesh(spec: str) -> "Mesh":
    """The mesh of --mesh where it is not chosen.

    Raises:
        InputError: As `make_mesh` and `check_named` do, and for "auto".
    """
    from w2s_jax.ops.sharding import make_mesh

    check_named(spec)
    if spec == AUTO:
        raise InputError(f"--mesh {AUTO} is of search, serve, sft and dpo; name it, as data=-1")
    return make_mesh(spec)


def check_named(spec: str) -> None:
    """Raise InputError for a --mesh without a word in it."""
    if not spec.strip(", "):
        raise InputError("--mesh is empty; give sizes such as data=2,tensor=4, or leave it out")


def name_of(mesh: "Mesh | None") -> str:
    """A mesh and its devices in words; of no mesh, the one device that is used."""
    import jax

    from w2s_jax.ops.sharding import spec_of

    if mesh is None:
        return mesh_name(spec_of((1, 1, 1)), 1, jax.devices()[0].device_kind)
    return mesh_name(spec_of(mesh.devices.shape), mesh.size, mesh.devices.flat[0].device_kind)


def mesh_name(spec: str, count: int, kind: str) -> str:
    """The same of `count` devices of a kind."""
    return f"{spec}, for {'one device' if count == 1 else f'{count} devices'} ({kind})"


def batch_parts(mesh: "Mesh | None") -> int:
    """Into how many parts the mesh cuts the rows of a batch."""
    from w2s_jax.ops.sharding import Placement

    return Placement(mesh).parts("batch", 0)


def check_batch(rows: int, accumulate: int, mesh: "Mesh | None", *, flag: str) -> None:
    """Raises InputError where `rows` cannot be cut into micro-batches for all parts of the mesh."""
    parts = batch_parts(mesh)
    if accumulate < 1 or rows < 1 or rows % (accumulate * parts):
        cuts = [f"{accumulate} micro-batches"] if accumulate != 1 or parts == 1 else []
        over = " × ".join([*cuts, *([f"{parts} parts of the mesh"] if parts > 1 else [])])
        needed = max(1, accumulate) * parts
        nearest = max(needed, round(rows / needed) * needed)
        raise InputError(f"{flag} {rows} is not divisible by {over}; try {nearest}")
