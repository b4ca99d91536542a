"""From a run's folder to a model, and checkpoints rewritten: what `w2s convert` does.

A run's record says what is trained, and any step that the run keeps can be exported.

In a dtype of few bits small changes are lost, and a guide is a small change of its base. What
training made is therefore kept in float32 unless another dtype is asked for, and then the loss by
rounding is measured.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves_with_path

from w2s_jax.errors import InputError, check_fetched
from w2s_jax.models.gguf import convert_gguf, is_gguf
from w2s_jax.models.huggingface import is_adapter, locate
from w2s_jax.models.load import (
    is_reward_model,
    load_adapted,
    load_config,
    load_model,
    load_reward_model,
)
from w2s_jax.models.lora import LoraConfig, merge
from w2s_jax.models.model import STORED, Model
from w2s_jax.models.peft import base_folder, base_of
from w2s_jax.models.reward import Classifier, RewardModel
from w2s_jax.models.save import save_classifier, save_model, save_reward_model
from w2s_jax.text.rows import check_writable, write_whole
from w2s_jax.text.tokenizer import holds_tokenizer, load_tokenizer
from w2s_jax.train.checkpoint import read_params
from w2s_jax.train.config import ConvertConfig
from w2s_jax.train.loop import CHECKPOINTS

RECORD = "run.json"
"""File in a run's folder that says what the run trains."""


@dataclass(frozen=True)
class Record:
    """What a run trains.

    Attributes:
        base: The checkpoint that it started from: a hub id or a folder's full path.
        weights: Hash of the base's weights; None if the run started from random weights.
        lora: The adapters that are trained on the base, if any.
    """

    base: str
    weights: str | None
    lora: LoraConfig | None = None


def write_record(directory: Path, record: Record) -> None:
    """Write a run's record into its folder.

    Raises:
        InputError: If it cannot be written.
    """
    text = json.dumps(asdict(record), indent=2) + "\n"
    write_whole(directory / RECORD, [text.encode()])


def read_record(directory: Path) -> Record:
    """Read the record in a run's folder.

    Raises:
        InputError: If it is missing or malformed.
    """
    path = directory / RECORD
    check_fetched(path)
    try:
        value = json.loads(path.read_bytes())
        lora = value["lora"]
        if lora is not None:
            lora = LoraConfig(**lora | {"targets": tuple(lora["targets"])})
        return Record(str(value["base"]), value["weights"], lora)
    except FileNotFoundError:
        raise InputError(f"{directory}: no {RECORD}, which says what is trained there") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no record of a run ({error})") from None


def is_run(directory: Path) -> bool:
    """Whether a folder is that of a training run."""
    return (directory / RECORD).is_file() or (directory / CHECKPOINTS).is_dir()


def weights_identity(directory: Path) -> str:
    """A hash of the weights and configs in a checkpoint's folder, by their content.

    For an adapter it covers the base as well.
    """
    digest = hashlib.sha256()
    if is_adapter(directory):
        digest.update(weights_identity(base_folder(directory)).encode())
    for file in sorted([*directory.glob("*.safetensors"), *directory.glob("*config.json")]):
        digest.update(file.name.encode())
        digest.update(bytes.fromhex(_digest(file)))
    return digest.hexdigest()[:24]


def file_digests(names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the files that exist, by file name without the folder, which may be moved."""
    files = (Path(name).expanduser() for name in names)
    return {path.name: _digest(path) for path in files if path.is_file()}


def _digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def export(directory: Path, step: int | None = None) -> tuple[int, Model, Model | None]:
    """Read a step that a run keeps as a model in float32, adapters merged.

    Args:
        directory: The run's folder.
        step: The step, by default the newest.

    Returns:
        (step, model, start): `start` is the model that the run began with, None if it was random.

    Raises:
        InputError: If the step is missing or not sound, or the adapters' base has changed since.
    """
    record = read_record(directory)
    step, params = read_params(directory / CHECKPOINTS, step)
    base = locate(record.base)
    if record.lora is not None and weights_identity(base) != record.weights:
        raise InputError(f"{directory}: its base {record.base} has other weights than it had then")
    start = None
    if record.weights is not None:
        start = load_model(base, dtype="float32", scan_layers="layers" in params)
    if record.lora is None:
        return step, Model(load_config(base), params), start
    assert start is not None
    return step, Model(start.config, merge(start.params, params, record.lora)), start


@dataclass(frozen=True)
class Rounding:
    """How much of the change that training made to the weights is lost in a dtype.

    Attributes:
        dtype: The dtype.
        reverted: Share of the changed weights that round to their initial value.
        error: Norm of the rounding error over the norm of the change.
    """

    dtype: str
    reverted: float
    error: float

    def __str__(self) -> str:
        return (
            f"{self.dtype} loses {self.reverted:.1%} of the weights' changes wholly; its error is "
            f"{self.error:.2g} of the change that training made"
        )


def rounded(params: Any, dtype: str) -> Any:
    """The parameters in a dtype.

    Raises:
        InputError: If a weight overflows in that dtype.
    """
    made = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(made)):
        raise InputError(f"{dtype} does not hold all weights: some are infinite in it")
    return made


def measure_rounding(start: Mapping[str, Any], trained: Mapping[str, Any], dtype: str) -> Rounding:
    """How much of the change from `start` to `trained` is lost in `dtype`.

    Only leaves of equal path and shape count: an adapter may have resized the embedding or the
    head.
    """
    before, after = (dict(tree_leaves_with_path(tree)) for tree in (start, trained))
    sums = [
        jax.device_get(_rounding_sums(before[path], leaf, dtype))
        for path, leaf in after.items()
        if path in before and before[path].shape == leaf.shape
    ]
    changed, reverted, moved, error = (float(sum(part)) for part in zip(*sums, strict=True))
    return Rounding(dtype, reverted / max(changed, 1.0), (error / max(moved, 1e-30)) ** 0.5)


@functools.partial(jax.jit, static_argnames="dtype")
def _rounding_sums(start: jax.Array, trained: jax.Array, dtype: str) -> tuple[jax.Array, ...]:
    """Sums of: changed, reverted by rounding, squares of the change, squares of the error."""
    start, trained = (leaf.astype(jnp.float32) for leaf in (start, trained))
    kept = trained.astype(dtype).astype(jnp.float32)
    changed = trained != start
    reverted = changed & (kept == start.astype(dtype).astype(jnp.float32))
    squares = [jnp.square(x).sum() for x in (trained - start, kept - trained)]
    return changed.sum(dtype=jnp.float32), reverted.sum(dtype=jnp.float32), *squares


def convert(config: ConvertConfig, *, tell: Callable[[str], None] = lambda line: None) -> None:
    """Rewrite a checkpoint: an adapter merged, a run's step, a GGUF file, or in another dtype.

    Args:
        config: The checkpoint, the folder to write, and what is changed.
        tell: Called with lines on what was read, lost by rounding and written.

    Raises:
        InputError: For anything wrong, before any weight is read.
    """
    if is_gguf(config.source):
        for flag, given in (("--merge-lora", config.merge_lora), ("--step", config.step)):
            if given is not None:
                raise InputError(f"{flag} goes with a checkpoint; convert {config.source} first")
        check_writable(Path(config.target) / "config.json")
        convert_gguf(config.source, config.target, dtype=config.dtype, tell=tell)
        return
    source = locate(config.source)
    adapter = locate(config.merge_lora) if config.merge_lora else None
    _check_places(config, source, adapter)
    check_writable(Path(config.target) / "config.json")
    # The first tokenizer found with the adapter, the source or the source's base.
    named = locate(read_record(source).base) if is_run(source) else source
    places = filter(None, (adapter, named, base_folder(named) if is_adapter(named) else None))
    tokenizer = next((load_tokenizer(at) for at in places if holds_tokenizer(at)), None)
    model = _read(config, source, tell)
    savers: dict[type, Callable[..., None]] = {
        Model: save_model, RewardModel: save_reward_model, Classifier: save_classifier
    }  # fmt: skip
    savers[type(model)](model, config.target, tokenizer=tokenizer)
    also = "" if tokenizer is not None else "; no tokenizer was found to write beside it"
    tell(f"{config.target}: written{also}")


def _check_places(config: ConvertConfig, source: Path, adapter: Path | None) -> None:
    if is_run(source) and adapter:
        raise InputError(f"{source} is a run's folder; name {source / 'model'} as SOURCE")
    if config.step is not None and not is_run(source):
        raise InputError(f"--step {config.step}: {source} is not the folder of a training run")
    if adapter and is_adapter(source):
        raise InputError(f"{source} is an adapter itself; name its base as SOURCE")
    if adapter and not is_adapter(adapter):
        raise InputError(f"--merge-lora {adapter}: it holds no adapter_config.json")
    base = Path(base_of(source)) if is_adapter(source) else None
    for folder in filter(None, (source, adapter, base)):
        if Path(config.target).expanduser().resolve() == folder.resolve():
            raise InputError(f"TARGET {config.target} is what is read from; name another folder")


def _read(
    config: ConvertConfig, source: Path, tell: Callable[[str], None]
) -> Model | RewardModel | Classifier:
    """The model to write, in its dtype; tells what a training loses in that dtype."""
    adapter = config.source if is_adapter(source) else config.merge_lora
    # An adapter's change would be lost in the few bits that its base may be stored in.
    stored = STORED if adapter is None else None
    dtype = stored if config.dtype == "auto" else config.dtype
    start: Model | None
    if is_run(source):
        step, trained, start = export(source, config.step)
        tell(f"step {step} of {source}")
    elif any(is_reward_model(path) for path in (config.source, config.merge_lora) if path):
        base = config.source if config.merge_lora else None
        return load_reward_model(config.merge_lora or config.source, base=base, dtype=dtype)
    elif adapter is None:
        return load_model(config.source, dtype=dtype)
    else:
        start = load_model(config.source if config.merge_lora else base_of(source), dtype="float32")
        trained = load_adapted(adapter, start)
    if config.dtype in ("auto", "float32"):
        return trained
    if start is not None:
        tell(f"--dtype {measure_rounding(start.params, trained.params, config.dtype)}")
    return Model(trained.config, rounded(trained.params, config.dtype))
