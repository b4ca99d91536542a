"""The mesh that is taken where none is asked for. Judged by shapes; nothing is compiled."""

from w2s_jax.errors import InputError
from w2s_jax.plan.candidates import Candidate, Shapes, candidates
from w2s_jax.plan.chips import Chip, chip_of, device_count


def preset_mesh(shapes: Shapes, topology: str) -> str:
    """The spec of the mesh that `likeliest_mesh` takes of a topology; raises as it does."""
    return likeliest_mesh(shapes, chip_of(topology), device_count(topology), topology).mesh


def likeliest_mesh(shapes: Shapes, chip: Chip, devices: int, where: str) -> Candidate:
    """The mesh of so many devices that is likeliest to fit and be quick; the same for the same.

    Of the meshes (data, fsdp, tensor) that divide every array and the rows, those come first whose
    held bytes, with a guess of the temporaries, fit a device; among them the least time guessed
    from published rates counts: what is read for each token of a search, and what is multiplied and
    exchanged in a step of training. Where none holds little enough, the one that holds least, which
    says so in its `why`.

    The rules that go with it are those of the shapes: `search` for a search, `train` for a
    training, unless they hold others. Raises InputError, saying `where`, where no mesh divides the
    arrays.
    """
    judged = candidates(shapes, chip, devices)
    known = [one for one in judged if one.held is not None]
    if not known:
        raise InputError(f"{where}: no mesh: {judged[0].why}")
    if known[0].why is None:
        return known[0]
    return min(known, key=lambda one: one.held or 0)
