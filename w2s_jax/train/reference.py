"""Log-probs of a reference model: computed once for all of a data set, and kept on disk.

Their place in a cache is named by what they depend on: the reference's weights and the data.
"""

import hashlib
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32
from tqdm import tqdm

from w2s_jax.models.huggingface import is_adapter
from w2s_jax.models.model import Model
from w2s_jax.models.peft import base_folder
from w2s_jax.ops.meshes import check_batch
from w2s_jax.text.batches import Data, Part
from w2s_jax.text.rows import check_writable, write_whole
from w2s_jax.train.objectives import REFERENCE, response_logprobs
from w2s_jax.train.step import Batch, host_rows, place

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Referenced:
    """Data whose batches also hold the `reference` log-probs, float32 [B, 2], of their rows."""

    data: Data | Part
    logprobs: Float32[np.ndarray, "n 2"]

    def __len__(self) -> int:
        return len(self.data)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return self.data.lengths

    @property
    def identity(self) -> str:
        """That of the data and of the log-probs."""
        digest = hashlib.sha256(self.logprobs.tobytes()).hexdigest()[:16]
        return f"{self.data.identity}+{digest}"

    def at(self, indices: np.ndarray | Sequence[int], part: slice = slice(None)) -> Batch:
        """The batch of these examples, or the `part` of it that a host takes."""
        batch = self.data.at(indices, part)
        return batch | {REFERENCE: self.logprobs[np.asarray(indices)][part]}

    def names(self, index: int) -> list[str]:
        """Where an example stands, as "FILE line N"."""
        return self.data.names(index)


def reference_logprobs(
    model: Model, data: Data | Part, *, rows: int, mesh: Mesh | None = None
) -> Float32[np.ndarray, "n 2"]:
    """Summed log-probs of both responses of every example, in nats; `rows` examples at a time.

    Examples of like length are read together, so that little is padded. On a mesh over several
    hosts each reads its share of the rows, and all get all the numbers; `rows` must be divisible
    by the parts of the mesh.
    """
    check_batch(rows, 1, mesh, flag="--eval-batch-size")
    share = host_rows(mesh, rows)
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    read = jax.jit(response_logprobs, out_shardings=whole)
    found = np.zeros((len(data), 2), np.float32)
    order = np.argsort(-data.lengths, kind="stable")
    quiet = not sys.stderr.isatty()
    with tqdm(total=len(data), desc="reference", unit="example", disable=quiet) as bar:
        for first in range(0, len(order), rows):
            indices = order[first : first + rows]
            filled = np.resize(indices, rows)
            batch = place(_rows(data.at(filled, share)), mesh, rows)
            found[indices] = np.asarray(read(model, batch))[: len(indices)]
            bar.update(len(indices))
    return found


def cached_logprobs(
    model: Model,
    data: Data | Part,
    *,
    rows: int,
    cache: Path,
    identity: str,
    mesh: Mesh | None = None,
) -> Float32[np.ndarray, "n 2"]:
    """`reference_logprobs`, read from the folder `cache` where a run has put them there.

    `identity` says which weights the model has, and in what dtype; a file that is damaged or of
    another length is computed anew.
    """
    digest = hashlib.sha256(f"{identity}\n{data.identity}".encode()).hexdigest()[:24]
    path = cache / f"reference-{digest}.npy"
    kept = _read(path, len(data))
    if _on_all_hosts(kept is not None) and kept is not None:
        log.info("reference log-probs of %d examples read from %s", len(data), path)
        return kept
    if jax.process_index() == 0:
        check_writable(path)
    found = reference_logprobs(model, data, rows=rows, mesh=mesh)
    if jax.process_index() == 0:
        write_whole(path, [_as_npy(found)])
    return found


def weights_identity(directory: Path) -> str:
    """A hash of the weights and the config in a checkpoint's directory, by their content.

    That of an adapter is of its base's too.
    """
    digest = hashlib.sha256()
    if is_adapter(directory):
        digest.update(weights_identity(base_folder(directory)).encode())
    for file in sorted([*directory.glob("*.safetensors"), *directory.glob("*config.json")]):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:24]


def file_digests(names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the files that are here, by the last part of their names: folders may be moved."""
    found = {}
    for path in (Path(name).expanduser() for name in names):
        if path.is_file():
            with path.open("rb") as opened:
                found[path.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def _on_all_hosts(flag: bool) -> bool:
    """Whether it holds on every host: what all must do together, all do or none does."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.bool_(flag)).all())


def _rows(batch: Mapping[str, Any]) -> Batch:
    return {name: batch[name] for name in ("tokens", "segments", "targets")}


def _as_npy(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _read(path: Path, count: int) -> np.ndarray | None:
    try:
        kept = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    sound = kept.shape == (count, 2) and kept.dtype == np.float32 and np.isfinite(kept).all()
    return kept if sound else None
