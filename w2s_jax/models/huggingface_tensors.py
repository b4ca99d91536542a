"""The tensors of a safetensors file, read part by part without keeping what was read.

Which files a checkpoint has, and what their tensors are, is in `models/huggingface.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from w2s_jax.errors import InputError, check_fetched
from w2s_jax.models.arrange import Tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file, which is opened for each read and closed again.

    Files are mapped, and what was read of a mapped file counts as the process's memory till then.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        try:
            with safe_open(self.path, framework="numpy") as file:
                return file.get_slice(self.name)[index]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.path} can no longer be read ({error})") from None


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors file by name; values stay on disk.

    Raises InputError when it is missing or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: _Tensor(path, name, tuple(values.get_shape()), values.get_dtype())
                for name, values in found.items()
            }
    except FileNotFoundError:
        raise InputError(f"{path.parent}: {path.name}, named by {INDEX}, is missing") from None
    except (OSError, SafetensorError) as error:
        check_fetched(path)
        raise InputError(f"{path} is not a whole safetensors file ({error})") from None


def equal(one: Any, other: Any) -> bool:
    """Whether two tensors hold the same values, read in blocks."""
    if one.get_shape() != other.get_shape():
        return False
    rows = one.get_shape()[0]
    blocks = (slice(start, min(start + 4096, rows)) for start in range(0, rows, 4096))
    return all(np.array_equal(one[block], other[block]) for block in blocks)
