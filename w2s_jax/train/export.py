"""From a run's folder to a model, and checkpoints written anew: what `w2s convert` does.

A run says what it trains, and any step it keeps can be taken.

Weights of few bits hold no small changes, and a guide is a small change: what training made is
kept in float32 unless another dtype is asked for, and then what rounding loses is measured.
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
"""The file of a run's folder that says what is trained there."""


@dataclass(frozen=True)
class Record:
    """What a run trains: the checkpoint it began with, and the adapters beside it, if any.

    base: a hub id or a folder's full path. weights: the identity of its weights, None where the run
    began with random ones.
    """

    base: str
    weights: str | None
    lora: LoraConfig | None = None


def write_record(directory: Path, record: Record) -> None:
    """Write a run's record into its folder. Raises InputError where that is not possible."""
    text = json.dumps(asdict(record), indent=2) + "\n"
    write_whole(directory / RECORD, [text.encode()])


def read_record(directory: Path) -> Record:
    """The record in a run's folder. Raises InputError where it is missing or malformed."""
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
    """A hash of the weights and the config in a checkpoint's directory, by their content.

    That of an adapter is of its base's too.
    """
    digest = hashlib.sha256()
    if is_adapter(directory):
        digest.update(weights_identity(base_folder(directory)).encode())
    for file in sorted([*directory.glob("*.safetensors"), *directory.glob("*config.json")]):
        digest.update(file.name.encode())
        digest.update(bytes.fromhex(_digest(file)))
    return digest.hexdigest()[:24]


def file_digests(names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the files that are here, by the last part of their names: folders may be moved."""
    files = (Path(name).expanduser() for name in names)
    return {path.name: _digest(path) for path in files if path.is_file()}


def _digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def export(directory: Path, step: int | None = None) -> tuple[int, Model, Model | None]:
    """A step that a run keeps, the newest by default: its number, the model, and what it came from.

    The model is in float32, adapters merged; what it came from is None where that was random.

    Raises:
        InputError: where the step is not there or not sound, and where the adapters' base has
            changed since.
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
    """What a dtype loses of the change that training made to the weights.

    reverted: the share of the changed weights that round to where they began. error: the norm of
    what rounding moves over that of what training moved.
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
    """The parameters in a dtype. Raises InputError where it does not reach that far."""
    made = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(made)):
        raise InputError(f"{dtype} does not hold all weights: some are infinite in it")
    return made


def measure_rounding(start: Mapping[str, Any], trained: Mapping[str, Any], dtype: str) -> Rounding:
    """What `dtype` would lose of the way from one tree of parameters to another, in what both have.

    An adapter may have given the model an embedding or a head of other rows.
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
    """(changed, changed back by rounding, squares of the change, squares of the error)."""
    start, trained = (leaf.astype(jnp.float32) for leaf in (start, trained))
    kept = trained.astype(dtype).astype(jnp.float32)
    changed = trained != start
    reverted = changed & (kept == start.astype(dtype).astype(jnp.float32))
    squares = [jnp.square(x).sum() for x in (trained - start, kept - trained)]
    return changed.sum(dtype=jnp.float32), reverted.sum(dtype=jnp.float32), *squares


def convert(config: ConvertConfig, *, tell: Callable[[str], None] = lambda line: None) -> None:
    """Write a checkpoint anew: with an adapter merged, a step of a training run, or another dtype.

    Args:
        config: the checkpoint, the folder to write, and what is changed.
        tell: takes lines on what was read, lost by rounding and written.

    Raises:
        InputError: for what is wrong, before any weight is read.
    """
    source = locate(config.source)
    adapter = locate(config.merge_lora) if config.merge_lora else None
    _check_places(config, source, adapter)
    check_writable(Path(config.target) / "config.json")
    # The first tokenizer that is found beside the adapter, the source or its base.
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
    """What is to be written, in its dtype; a line on what that loses of a training."""
    adapter = config.source if is_adapter(source) else config.merge_lora
    # What an adapter adds is lost in the few bits that a base may be stored in.
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
